"""Every algorithm to convolve and pool patches gives what the dense layer gives on the map with its holes zeroed."""

import itertools

import pytest
import torch
from timm.layers import AvgPool2dSame, BlurPool2d, Conv2dSame, ScaledStdConv2d, StdConv2d, StdConv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn

from spark_fast.encoder import VisiblePatches
from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.conv.costs import choose_algorithm
from spark_fast.encoder.conv.geometry import layer_axes
from spark_fast.encoder.convert_network import PACKED, convert_layers
from spark_fast.masking import sample_visible

GRID = (3, 4)


def some_visible(batch=2, keep=5):
    return VisiblePatches(sample_visible(0, 0, torch.arange(batch), GRID, keep), GRID)


def converted(layer):
    context = EncoderContext(dense=False)
    return convert_layers(layer, PACKED, context)[0], context


def both(layer, visible, b, channels, fill=0.0):
    """(packed output and gradients, dense ones) of one layer."""
    dense = torch.randn(visible.batch, channels, GRID[0] * b, GRID[1] * b, dtype=torch.float64)
    packed_layer, context = converted(layer)
    context.visible = visible
    x = visible.pack(dense).requires_grad_()
    y = visible.unpack(packed_layer(x))
    weights = torch.randn_like(y) * visible.cells(y.shape[2])
    packed = torch.autograd.grad((y * weights).sum(), [x, *packed_layer.parameters()])
    context.visible = None
    z = dense.clone().requires_grad_()
    out = packed_layer(z.masked_fill(~visible.cells(z.shape[2]), fill))
    out = out.masked_fill(~visible.cells(out.shape[2]), 0)
    expected = torch.autograd.grad((out * weights).sum(), [z, *packed_layer.parameters()])
    return (y, visible.unpack(packed[0]), *packed[1:]), (out, *expected)


def agree(layer, b, channels=4, fill=0.0):
    for got, expected in zip(*both(layer.double(), some_visible(), b, channels, fill), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


CONVOLUTIONS = [
    (b, k, s, d, groups)
    for b, k, s, d, groups in itertools.product([1, 2, 4, 8, 16], [1, 2, 3, 4, 5, 7], [1, 2, 4], [1, 2], [1, 2, 4])
    if b % s == 0 and (k >= s or k == 1) and (d == 1 or k == 3) and not (k % 2 == 0 and k != s)
]


@pytest.mark.parametrize(("b", "k", "s", "d", "groups"), CONVOLUTIONS)
def test_convolution(b, k, s, d, groups):
    padding = d * (k - 1) // 2 if k % 2 else 0
    agree(nn.Conv2d(4, 4, k, s, padding, d, groups, bias=k % 2 == 1), b)


def test_the_grid_of_convolutions_takes_every_algorithm():
    used = set()
    for b, k, s, d, groups in CONVOLUTIONS:
        if k % 2:
            layer = nn.Conv2d(64 * groups, 64 * groups, k, s, d * (k - 1) // 2, d, groups, device="meta")
            used.add(choose_algorithm(b, layer_axes(layer), layer.weight, groups, 5 / 12))
    assert used == {"pointwise_gemm", "halo", "im2col", "dense"}


SPECIAL = [
    (nn.Conv2d(4, 6, (1, 7), padding=(0, 3), groups=2), 4),
    (nn.Conv2d(4, 4, (11, 1), padding=(5, 0), groups=4), 2),
    (nn.Conv2d(4, 4, 3, padding="same", dilation=2), 4),
    (Conv2dSame(4, 4, 3, 2), 4),
    (Conv2dSame(4, 4, 5, 2, groups=4), 8),
    (Conv2dSame(4, 4, 1, 2), 2),
    (StdConv2d(4, 4, 3, padding=1), 4),
    (StdConv2dSame(4, 4, 3, 2), 4),
    (ScaledStdConv2d(4, 4, 3, padding=1), 2),
    (BlurPool2d(4), 4),
    (nn.Upsample(scale_factor=2, mode="bilinear"), 2),
    (nn.Upsample(scale_factor=2, mode="nearest"), 2),
    (nn.AvgPool2d(3, 1, 1, count_include_pad=False), 4),
    (nn.AvgPool2d(3, 2, ceil_mode=True), 4),
    (AvgPool2dSame(3, 2), 4),
    (nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3)), 4),
    (nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3, 2)), 4),
]


@pytest.mark.parametrize(("layer", "b"), SPECIAL, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else v)
def test_layers_with_a_geometry_of_their_own(layer, b):
    agree(layer, b)


@pytest.mark.parametrize(
    ("pool", "b"),
    [
        (nn.MaxPool2d(3, 2, 1), 8),
        (nn.MaxPool2d(3, 2, 1), 2),
        (nn.MaxPool2d(2, 2), 4),
        (nn.MaxPool2d(3, 1, 1), 4),
        (nn.MaxPool2d(5, 1, 2), 8),
        (nn.MaxPool2d(13, 1, 6), 1),  # further than one patch
        (nn.MaxPool2d(3, 2, 0, ceil_mode=True), 4),
        (MaxPool2dSame(3, 2), 4),
    ],
)
def test_max_pooling_is_the_maximum_over_visible_cells(pool, b):
    agree(pool, b, 3, fill=float("-inf"))
    layer, context = converted(pool)
    context.visible = some_visible()
    assert (layer(torch.full((10, 1, b, b), -5.0)) == -5).all(), "a hole's zero won over a visible value"


def test_a_zero_padded_maximum_sees_the_padding_and_not_the_holes():
    """BiT pads with zeros before its max pooling: at the image's border a zero is real, beside a hole it is not."""
    layer, context = converted(nn.Sequential(nn.ConstantPad2d(1, 0.0), nn.MaxPool2d(3, 2)))
    context.visible = VisiblePatches(torch.tensor([[4]]), (3, 3))
    assert (layer(torch.full((1, 1, 4, 4), -5.0)) == -5).all()
    context.visible = VisiblePatches(torch.tensor([[0]]), (3, 3))
    assert layer(torch.full((1, 1, 4, 4), -5.0))[0, 0].tolist() == [[0, 0], [0, -5]]


@pytest.mark.parametrize(("b", "k", "s", "p"), [(4, 2, 2, 0), (4, 3, 2, 1), (2, 3, 1, 1)])
def test_average_pooling_divides_as_the_original(b, k, s, p):
    agree(nn.AvgPool2d(k, s, p), b, 3)


def test_called_without_patches_a_converted_layer_is_the_ordinary_one():
    layer = nn.Conv2d(3, 5, 3, 2, 1)
    x = torch.randn(2, 3, 9, 9)
    expected = layer(x)
    assert torch.equal(converted(layer)[0](x), expected)


def test_the_printed_layer_says_how_it_is_computed():
    layer, _ = converted(nn.Conv2d(3, 5, 3, padding=1))
    assert "algorithm" not in repr(layer)
    layer.cells, layer.visible_ratio = 8, 0.4
    assert "b=8, algorithm=halo" in repr(layer)
