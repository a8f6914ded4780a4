"""Every way to convolve and pool patches gives what the dense layer gives on the map with its holes zeroed."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spark_fast.encoder import PackedEncoder, Visible
from spark_fast.encoder.depthwise import depthwise
from spark_fast.encoder.halo import Current, plan
from spark_fast.encoder.pack import PACKED, UnsupportedLayerError, convert
from spark_fast.masking import sample_visible

GRID = (3, 4)


def visible(batch=2, keep=5):
    return Visible(sample_visible(0, 0, torch.arange(batch), GRID, keep), GRID)


def converted(layer):
    current = Current()
    return convert(layer, PACKED, current), current


def both(layer, seen, b, channels, fill=0.0):
    """(packed output and gradients, dense ones) of one layer."""
    dense = torch.randn(seen.batch, channels, GRID[0] * b, GRID[1] * b, dtype=torch.float64)
    packed_layer, current = converted(layer)
    current.visible = seen
    x = seen.pack(dense).requires_grad_()
    y = seen.unpack(packed_layer(x))
    weights = torch.randn_like(y) * seen.cells(y.shape[2])
    packed = torch.autograd.grad((y * weights).sum(), [x, *packed_layer.parameters()])
    current.visible = None
    z = dense.clone().requires_grad_()
    out = packed_layer(z.masked_fill(~seen.cells(z.shape[2]), fill))
    out = out.masked_fill(~seen.cells(out.shape[2]), 0)
    expected = torch.autograd.grad((out * weights).sum(), [z, *packed_layer.parameters()])
    return (y, seen.unpack(packed[0]), *packed[1:]), (out, *expected)


CONVOLUTIONS = [
    (b, k, s, d, groups)
    for b, k, s, d, groups in itertools.product([1, 2, 4, 8, 16], [1, 2, 3, 4, 5, 7], [1, 2, 4], [1, 2], [1, 2, 4])
    if b % s == 0 and (k >= s or k == 1) and (d == 1 or k == 3) and not (k % 2 == 0 and k != s)
]


@pytest.mark.parametrize(("b", "k", "s", "d", "groups"), CONVOLUTIONS)
def test_convolution(b, k, s, d, groups):
    padding = d * (k - 1) // 2 if k % 2 else 0
    layer = nn.Conv2d(4, 4, k, s, padding, d, groups, bias=k % 2 == 1).double()
    for got, expected in zip(*both(layer, visible(), b, 4), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_the_grid_of_convolutions_takes_every_way():
    ways = {
        plan(b, k, s, d * (k - 1) // 2, d * (k - 1) + 1 - s - d * (k - 1) // 2, groups, 5 / 12)
        for b, k, s, d, groups in CONVOLUTIONS
        if k % 2
    }
    assert ways == {"rows", "window", "columns", "canvas"}


@pytest.mark.parametrize(("b", "k", "s", "p"), [(8, 3, 2, 1), (2, 3, 2, 1), (4, 2, 2, 0), (4, 3, 1, 1), (8, 5, 1, 2)])
def test_max_pooling_is_the_maximum_over_visible_cells(b, k, s, p):
    layer = nn.MaxPool2d(k, s, p)
    for got, expected in zip(*both(layer, visible(), b, 3, fill=float("-inf")), strict=True):
        torch.testing.assert_close(got, expected)
    negative = converted(nn.MaxPool2d(k, s, p))
    negative[1].visible = visible()
    assert (negative[0](torch.full((10, 1, b, b), -5.0)) == -5).all(), "a hole's zero won over a visible value"


@pytest.mark.parametrize(("b", "k", "s", "p"), [(4, 2, 2, 0), (4, 3, 2, 1), (2, 3, 1, 1)])
def test_average_pooling_divides_as_the_original(b, k, s, p):
    for got, expected in zip(*both(nn.AvgPool2d(k, s, p), visible(), b, 3), strict=True):
        torch.testing.assert_close(got, expected)


def test_called_without_patches_a_converted_layer_is_the_ordinary_one():
    layer = nn.Conv2d(3, 5, 3, 2, 1)
    x = torch.randn(2, 3, 9, 9)
    expected = layer(x)
    assert torch.equal(converted(layer)[0](x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "padding"), [(7, 3), (3, 0), (5, 2)])
def test_depthwise_gradients_are_those_of_the_convolution(dtype, k, padding):
    x, weight = torch.randn(3, 8, 12, 10), torch.randn(8, 1, k, k)
    bias = torch.randn(8)
    runs = []
    for function, kind in ((depthwise, dtype), (lambda *a: F.conv2d(*a[:3], a[3], a[4], 1, 8), torch.float64)):
        inputs = [t.to(dtype).to(kind).requires_grad_() for t in (x, weight, bias)]
        out = function(*inputs, 1, padding)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(kind)
        runs.append([out, *torch.autograd.grad(out, inputs, grad)])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for got, expected in zip(*runs, strict=True):
        error = (got.double() - expected).norm() / expected.norm()
        assert error < tolerance


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(3, 3, (1, 3), padding=(0, 1)), "not square"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), "count_include_pad=False"),
        (nn.Conv2d(3, 3, 3, padding="same"), "padding='same'"),
        (nn.MaxPool2d(2, return_indices=True), "return_indices"),
        (nn.LSTM(3, 3), "LSTM"),
    ],
)
def test_a_layer_that_cannot_be_packed_is_refused_by_name(layer, reason):
    network = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
    with pytest.raises(UnsupportedLayerError, match=r"1 \(") as refused:
        convert(network, PACKED, Current())
    assert reason in str(refused.value)
    assert type(network[0]) is nn.Conv2d, "a refused network must stay as it was"


class Halving(nn.Module):
    """A three-level network of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.down = nn.ModuleList(nn.Conv2d(8, 8, 3, 2, 1) for _ in range(2))

    def forward(self, x):
        levels = [self.stem(x)]
        for layer in self.down:
            levels.append(layer(levels[-1].relu()))
        return levels


def test_input_sizes_off_the_patch_grid_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="input size 40x48 is not a multiple of the patch, 16 px"):
        PackedEncoder(Halving(), (40, 48))
    assert PackedEncoder(Halving(), (32, 48)).strides == [4, 8, 16]
