"""What is packed and what is refused, by name and with the reason."""

import pytest
import timm
import torch
from torch import nn

from spark_fast import pack, verify
from spark_fast.encoder import MaskedEncoder, PackedEncoder, UnsupportedLayerError, register
from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.convert_network import PACKED, convert_layers
from spark_fast.encoder.layer_registry import LAYER_KINDS
from spark_fast.encoder.verify import VerificationError


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(3, 3, 3), "kernel 3x3, stride 1, padding 0 and 0 do not turn a map into one 1 times smaller"),
        (nn.Conv2d(3, 3, 3, stride=(2, 1), padding=1), r"stride=\(2, 1\) is not square"),
        (nn.MaxPool2d(2, return_indices=True), "return_indices"),
        (nn.AdaptiveAvgPool2d(7), "of no known kind"),
        (nn.ReflectionPad2d(1), "of no known kind"),
        (nn.Sequential(nn.ZeroPad2d(1), nn.ReLU()), "padding not followed by a convolution or pooling"),
        (nn.Sequential(nn.ConstantPad2d(1, 2.0), nn.Conv2d(3, 3, 3)), "padded with 2.0"),
        (nn.LSTM(3, 3), "recurrent"),
        (nn.MultiheadAttention(4, 1), "attention"),
    ],
)
def test_a_layer_that_cannot_be_packed_is_refused_by_name(layer, reason):
    network = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
    with pytest.raises(UnsupportedLayerError, match=r"cannot be packed: 1[.01]* \(") as refused:
        convert_layers(network, PACKED, EncoderContext(dense=False))
    assert refused.match(reason)
    assert type(network[0]) is nn.Conv2d, "a refused network must stay as it was"


class Halving(nn.Module):
    """A three-level network of its own."""

    def __init__(self, kernel=3, extra=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.down = nn.ModuleList(nn.Conv2d(8, 8, 3, 2, 1) for _ in range(2))
        self.extra = extra or nn.Identity()

    def forward(self, x):
        levels = [self.stem(x)]
        for layer in self.down:
            levels.append(layer(levels[-1].relu()))
        levels[-1] = self.extra(levels[-1])
        return levels


def test_input_sizes_off_the_patch_grid_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="input size 40x48 is not a multiple of the patch, 16 px"):
        PackedEncoder(Halving(), (40, 48))
    assert PackedEncoder(Halving(), (32, 48)).strides == [4, 8, 16]


def test_a_layer_that_finds_less_than_a_patch_is_refused_and_all_is_put_back():
    network = Halving(extra=nn.Sequential(nn.Conv2d(8, 8, 2, 2), nn.Upsample(scale_factor=2)))
    with pytest.raises(UnsupportedLayerError, match=r"extra.0 \(Conv2d\): .* does not divide the 1 cells of a patch"):
        pack(network, (64, 64))
    assert type(network.stem) is nn.Conv2d


def test_attention_is_refused_as_such_and_not_layer_by_layer():
    with pytest.raises(UnsupportedLayerError, match=r"xca \(CrossCovarianceAttn\): attention: .*, and 2 more"):
        pack(timm.create_model("edgenext_xx_small", features_only=True))


class ResBlock(nn.Sequential):
    """Named as a token mixer of timm is."""


def test_a_block_of_ones_own_is_not_judged_by_a_common_name():
    assert pack(Halving(extra=ResBlock(nn.Conv2d(8, 8, 3, padding=1))), (32, 32)).patch == 16
    with pytest.raises(UnsupportedLayerError, match=r"blocks.0 \(MixerBlock\): token mixing"):
        pack(timm.create_model("mixer_s32_224", features_only=True))


class EdgeAttention(nn.Module):
    """Named as attention, but a gate."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x * self.gate(x).sigmoid()


class MyAttention(nn.Module):
    """Attention out of layers of known kinds."""

    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        cells = self.project(x).flatten(2)  # (B, C, h, w) -> (B, C, h*w)
        return (cells @ (cells.transpose(1, 2) @ cells).softmax(-1)).view_as(x)


def test_attention_of_ones_own_is_judged_by_what_it_computes_not_by_its_name():
    assert verify(Halving(extra=EdgeAttention())).identity < 1e-9
    with pytest.raises(VerificationError, match="with nothing masked the packed network differs"):
        verify(Halving(extra=MyAttention()))


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        return x * self.gain


def test_a_layer_of_ones_own_is_packed_once_its_kind_is_told(monkeypatch):
    with pytest.raises(UnsupportedLayerError, match=r"extra \(Gain\): of no known kind \(see spark_fast.encoder.reg"):
        pack(Halving(extra=Gain()), (32, 32))
    monkeypatch.setitem(LAYER_KINDS, nn.ReLU, "pointwise")  # restored after the test, with what register adds
    register("pointwise", Gain)
    try:
        assert pack(Halving(extra=Gain()), (32, 32)).patch == 16
    finally:
        del LAYER_KINDS[Gain]
    with pytest.raises(ValueError, match="unknown kind of layer 'pointy'"):
        register("pointy", Gain)


def test_the_printed_encoder_shows_the_plan():
    text = repr(pack(timm.create_model("convnext_atto", features_only=True)))
    assert "groups=40, b=8, algorithm=" in text
    assert "b=1, algorithm=dense" in text


def test_stages_keep_the_first_levels():
    network = timm.create_model("resnet10t", features_only=True, out_indices=(1, 2))
    encoder = MaskedEncoder(network, (64, 64), stages=2)
    assert (encoder.strides, encoder.patch) == ([4, 8], 8)
    with pytest.raises(ValueError, match=r"conv1.0 \(MaskedLocalConv2d\): packed already"):
        MaskedEncoder(network, (64, 64))
    with pytest.raises(ValueError, match="stages must be from 1 to 4"):
        MaskedEncoder(timm.create_model("resnet10t", features_only=True), (64, 64), stages=5)
