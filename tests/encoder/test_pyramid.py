"""The levels of a network, found without computing, and networks that have none."""

import pytest
import timm
import torch
from torch import nn

from spark_fast.encoder import PackedEncoder
from spark_fast.encoder.pyramid import as_size, feature_maps, find_pyramid, meta_images, run_on_meta
from tests.encoder.halving import Halving


def test_input_sizes_off_the_patch_grid_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="input size 40x48 is not a multiple of the patch, 16 px"):
        PackedEncoder(Halving(), (40, 48))
    assert PackedEncoder(Halving(), (32, 48)).strides == [4, 8, 16]


class Maps(nn.Module):
    """Returns maps of these strides, of a few pixels less than they should have."""

    def __init__(self, *strides, missing=0, output=list):
        super().__init__()
        self.strides, self.missing, self.output = strides, missing, output

    def forward(self, x):
        sides = [tuple(n // s - self.missing for n in x.shape[2:]) for s in self.strides]
        return self.output(x.new_zeros(len(x), s, *side) for s, side in zip(self.strides, sides, strict=True))


def test_maps_finer_than_stride_4_are_left_out_and_the_last_stride_is_the_patch():
    found = find_pyramid(Maps(1, 2, 4, 8, 16), (32, 64))
    assert found == ([2, 3, 4], [4, 8, 16], [4, 8, 16])
    assert found.patch == 16
    assert find_pyramid(Maps(2, 4, 8, 16), (32, 64), stages=2).patch == 8
    assert find_pyramid(Maps(4, 8, output=tuple), (32, 64)).patch == 8


@pytest.mark.parametrize(
    ("network", "size", "message"),
    [
        (Maps(4, 16), (64, 64), r"each half the one before; strides are \[4, 16\]"),
        (Maps(2), (64, 64), r"strides are \[\]"),
        (Maps(4, 8, 16), (40, 48), "input size 40x48 is not a multiple of the patch, 16 px"),
        (Maps(4, 8, missing=1), (64, 64), "feature map 0 is 15x15, where stride 4 of 64x64 px gives 16x16"),
        (Maps(4, 8, output=dict.fromkeys), (64, 64), r"must return a list of feature maps \(B, C, H, W\), got dict"),
        (nn.Flatten(), (64, 64), "must return a list of feature maps .* got Tensor"),
        (nn.Conv2d(4, 4, 1), (64, 64), "does not run on 64x64 images: ."),
    ],
)
def test_a_network_without_a_pyramid_is_refused_with_what_it_has(network, size, message):
    with pytest.raises(ValueError, match=message):
        find_pyramid(network, size)


@pytest.mark.parametrize("stages", [0, 4])
def test_stages_are_counted_among_the_levels_that_there_are(stages):
    with pytest.raises(ValueError, match=f"stages must be from 1 to 3, the levels of this network, got {stages}"):
        find_pyramid(Maps(2, 4, 8, 16), (64, 64), stages)


def test_maps_of_a_channels_last_network_are_turned_round():
    network = timm.create_model("test_mambaout", features_only=True).eval()
    assert network.output_fmt == "NHWC"
    images = torch.randn(1, 3, 64, 96)
    for turned, original in zip(feature_maps(network, images), network(images), strict=True):
        assert torch.equal(turned.permute(0, 2, 3, 1), original)
    assert find_pyramid(network, (64, 96)).channels == [m.shape[1] for m in feature_maps(network, images)]


def test_a_run_on_the_meta_device_changes_nothing_of_the_network():
    network = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4).eval(), nn.Dropout()).double()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images = meta_images(network, 2, (16, 24))
    assert (images.shape, images.dtype, images.is_meta) == ((2, 3, 16, 24), torch.float64, True)
    assert run_on_meta(network, images).shape == (2, 4, 4, 6)
    assert [m.training for m in network] == [True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(RuntimeError):
        run_on_meta(network, images.float())
    assert [m.training for m in network] == [True, False, True], "put back after a failure too"


def test_an_input_size_may_be_one_number():
    assert as_size(224) == (224, 224)
    assert as_size((192, 256)) == as_size([192, 256]) == (192, 256)
