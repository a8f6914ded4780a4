"""Both checks pass on networks that can be packed, and name the module that mixes positions where it must not."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from spark_fast import build_spark, verify
from spark_fast.encoder import UnsupportedLayerError
from spark_fast.encoder.layer_registry import LAYER_KINDS
from spark_fast.encoder.verify import VerificationError


def test_identity_and_no_leak(network):
    found = verify(network, (64, 96))
    assert found.identity < 1e-6
    assert found.leak == 0


class Cheating(nn.Module):
    """A network that mixes positions in its own code, where no layer shows it."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x * x.mean((2, 3), keepdim=True)
        return [x, self.down(x)]


def test_a_functional_mix_of_positions_is_caught():
    with pytest.raises(VerificationError, match=r"own code \(Cheating.forward\) between `stem` .* mixes positions"):
        verify(Cheating(), (32, 32))
    small = {"input_size": 32, "mask_ratio": 0.5, "decoder_width": 32}
    with pytest.raises(ValueError, match="mixes positions"):
        build_spark(Cheating(), **small)
    assert build_spark(Cheating(), check=False, **small)


class Careless(nn.Module):
    """Its second level mixes inside a block: the message must name that block."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 4, 4), nn.Sequential(nn.Conv2d(8, 8, 2, 2), Shifted())

    def forward(self, x):
        x = self.stem(x)
        return [x, self.block(x)]


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(x.roll(1, 3))


def test_a_fault_is_named_by_the_module_it_is_in():
    with pytest.raises(VerificationError, match=r"^the code of `block.1` \(Shifted.forward\) before its first layer"):
        verify(Careless(), (16, 24))


class Broken(nn.Module):
    """Two levels; what is wrong with it is the functions given: on the image, between the layers, at the end."""

    def __init__(self, image=None, middle=None, end=None, channels=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 8, 2, 2), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 2, 2)))
        self.down = nn.Conv2d(8, 8, 2, 2)
        self.image, self.middle, self.end = (step or (lambda x: x) for step in (image, middle, end))

    def forward(self, x):
        fine = self.stem(self.image(x))
        coarse = self.down(self.middle(fine))
        return self.end([fine, coarse])


def attend(x):
    tokens = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2).reshape(x.shape)


FIRST = r"^the network's own code \(Broken.forward\) before its first layer, `stem` \(Sequential\), "
MIDDLE = r"^the network's own code \(Broken.forward\) between `stem` \(Sequential\) and `down` \(Conv2d\) "
IN_FRONT = "register its kind with spark_fast.encoder.register. Or do it to the images, before the network$"
FORM = r"^the network must return a list of feature maps \(B, C, H, W\), got "


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"image": lambda x: x - x.mean()}, rf"{FIRST}mixes the images of a batch \(it calls mean, sub\).*{IN_FRONT}"),
        ({"image": lambda x: x / x.std((2, 3), keepdim=True)}, rf"{FIRST}mixes positions \(it calls std, div\)"),
        ({"image": lambda x: F.layer_norm(x, x.shape[1:])}, rf"{FIRST}mixes positions \(it calls layer_norm\)"),
        ({"image": lambda x: F.pad(x, (4, 0, 4, 0))[:, :, :-4, :-4]}, rf"{FIRST}mixes .* use nn.ZeroPad2d for pad"),
        ({"image": lambda x: F.pad(x, (4, 4, 4, 4))}, "its own forward gives the first layer 104x104 px in place of"),
        ({"image": lambda x: F.interpolate(x, (64, 64))}, "its own forward gives the first layer 64x64 px in place of"),
        ({"image": lambda x: x + torch.rand_like(x)}, rf"{FIRST}draws random numbers \(it calls rand_like, add\)"),
        ({"middle": lambda x: F.conv2d(x, x.new_ones(8, 8, 3, 3), padding=1)}, rf"{MIDDLE}.* use nn.Conv2d for conv2d"),
        ({"middle": lambda x: F.batch_norm(x, None, None, training=True)}, rf"{MIDDLE}mixes the images of a batch"),
        ({"middle": attend}, rf"{MIDDLE}mixes positions .* Attention cannot be packed: leave it out$"),
        ({"end": lambda maps: [maps[0], maps[1].roll(1, 3)]}, r"after its last layer, `down` \(Conv2d\), mixes"),
        ({"channels": 1}, r"first layer, stem.0 \(Conv2d\), takes 1 channel, and images have 3. .* give in_chans 1,"),
        ({"channels": 3, "image": lambda x: x[:, :1]}, r"stem.0 \(Conv2d\) takes 3 channels and is given 1$"),
        ({"end": lambda maps: maps[1]}, rf"{FORM}Tensor of shape \(1, 8, 12, 12\), a single one. Return"),
        ({"end": lambda maps: {"fine": maps[0], "coarse": maps[1]}}, rf"{FORM}dict with the keys fine, coarse. Return"),
        ({"end": lambda maps: (maps[0], maps)}, rf"{FORM}tuple whose item 1 is a list. Return nothing but maps"),
        ({"end": lambda maps: [maps[0].flatten(2)]}, rf"{FORM}list whose item 0 is a Tensor of shape \(1, 8, 576\)"),
        ({"end": lambda maps: None}, f"{FORM}None: its forward returns nothing"),
        ({"end": lambda maps: []}, f"{FORM}list without any. Return the map"),
        ({"end": lambda maps: maps[::-1]}, r"strides are \[8, 4\]: they come in another order. Return"),
        ({"end": lambda maps: [maps[0], *maps]}, r"strides are \[4, 4, 8\]: two maps have one stride. Return one"),
        ({"end": lambda maps: [m.permute(0, 2, 3, 1) for m in maps]}, "channels come last, .* Return map.permute"),
        ({"image": lambda x: x + 1 if x.mean().item() > 0 else x}, "looks at the values of a tensor, as by .item()"),
        ({"middle": lambda x: x.view(-1, 8, 7, 7)}, r"^the network does not run on 96x96 .* \(Broken\): shape"),
    ],
    ids=lambda v: v[:40] if isinstance(v, str) else "",
)  # fmt: skip
def test_what_is_wrong_comes_first_and_then_what_to_do(broken, message):
    with pytest.raises(VerificationError, match=message):
        verify(Broken(**broken))


def test_what_mixes_no_positions_is_taken_wherever_it_stands():
    tokens = lambda x: F.layer_norm(x.flatten(2).transpose(1, 2), (8,)).transpose(1, 2).reshape(x.shape)  # noqa: E731
    assert verify(Broken(image=lambda x: (x - 0.5) / 0.25, middle=tokens, end=tuple)).leak == 0


def test_dropout_is_left_out_of_the_comparison():
    network = Broken(middle=nn.Dropout(0.5))
    assert verify(network).leak == 0
    assert network.middle.p == 0.5


class Centre(nn.Module):
    def forward(self, x):
        return x - x.mean((2, 3), keepdim=True)


def test_the_remedy_works_the_code_in_a_module_of_a_kind(monkeypatch):
    with pytest.raises(VerificationError, match="before its first layer"):
        verify(Broken(image=lambda x: x - x.mean((2, 3), keepdim=True)))
    with pytest.raises(UnsupportedLayerError, match=r"image \(Centre\): of unknown kind"):
        verify(Broken(image=Centre()))
    monkeypatch.setitem(LAYER_KINDS, Centre, "global_reduction")
    assert verify(Broken(image=Centre())).leak == 0
    monkeypatch.setitem(LAYER_KINDS, Centre, "pointwise")
    with pytest.raises(VerificationError, match=r"^`image` \(Centre\) mixes positions: .* does not behave as the kind"):
        verify(Broken(image=Centre()))


def test_a_layer_may_use_the_statistics_of_a_batch():
    verify(Broken(middle=nn.BatchNorm2d(8, track_running_stats=False)))


def test_a_forward_that_takes_more_than_images_is_refused_with_its_signature():
    class Masked(Broken):
        def forward(self, x, mask):
            return super().forward(x * mask)

    with pytest.raises(VerificationError, match=r"^the network's forward\(x, mask\) .* alone: missing .* 'mask'. Give"):
        verify(Masked())


def test_layers_that_cannot_be_packed_are_told_beside_a_wrong_output_and_before_a_wrong_size():
    with pytest.raises(
        VerificationError, match=r"^the network must return .* Besides, it cannot be packed: middle \(LSTM"
    ):
        verify(Returning(nn.LSTM(8, 8)))
    with pytest.raises(UnsupportedLayerError, match=r"middle \(LSTM\): recurrent"):
        verify(Returning(nn.LSTM(8, 8), size=7))


class Returning(nn.Module):
    """Returns its image; has a layer that it does not use, and takes images of one size if that is given."""

    def __init__(self, layer, size=None):
        super().__init__()
        self.middle, self.size = layer, size

    def forward(self, x):
        assert self.size in (None, x.shape[2])
        return x


def test_code_that_relies_on_the_size_of_the_map_is_told_that_it_gets_patches():
    fixed = Broken(middle=lambda x: x + torch.ones(1, 1, 8, 8, dtype=x.dtype, device=x.device))
    with pytest.raises(UnsupportedLayerError, match=r"network \(Broken\): .* which is given patches \(V, 3, 8, 8\)"):
        verify(fixed, 32)


def test_a_number_stands_for_a_square_input():
    small = timm.create_model("test_resnet", features_only=True)
    assert verify(small, 64) == verify(small, (64, 64)) != verify(small, (64, 96))


def test_the_network_itself_is_left_as_it_was():
    network = timm.create_model("test_resnet", features_only=True)
    before, kinds = copy.deepcopy(network.state_dict()), [type(m) for m in network.modules()]
    verify(network, 64)
    assert [type(m) for m in network.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
