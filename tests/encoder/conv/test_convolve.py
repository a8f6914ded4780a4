"""Every algorithm gives the dense convolution of the map with its holes zeroed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spark_fast.encoder.conv.convolve import convolve, gather, gather_sum, gather_windows
from spark_fast.encoder.conv.geometry import layer_axes
from tests.encoder.masks import masks, some_visible

GRID = (3, 4)
ALGORITHMS = ("halo", "im2col", "dense")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("k", "s", "groups"), [((3, 3), 1, 1), ((1, 5), 1, 4), ((3, 1), 1, 1), ((3, 3), 2, 2)])
def test_all_algorithms_are_one_convolution(algorithm, k, s, groups):
    if algorithm == "im2col" and groups > 1:
        pytest.skip("a matrix product has no groups")
    torch.manual_seed(0)
    visible, b = some_visible(), 4
    layer = nn.Conv2d(4, 8, k, s, (k[0] // 2, k[1] // 2), groups=groups).double()
    dense = torch.randn(2, 4, GRID[0] * b, GRID[1] * b, dtype=torch.float64) * visible.cells(GRID[0] * b)
    runs = []
    for packed in (True, False):
        x = dense.clone().requires_grad_()
        if packed:
            y = convolve(visible.pack(x), layer.weight, layer.bias, layer_axes(layer), groups, visible, algorithm)
        else:
            y = visible.pack(layer(x))
        weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad((y * weights).sum(), [x, layer.weight, layer.bias])
        runs.append([y, gradients[0] * visible.cells(x.shape[2]), *gradients[1:]])
    for got, expected in zip(*runs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_what_backward_keeps_is_the_input_alone():
    """What the convolution reads is gathered again: that is where the memory would go."""
    visible, b = some_visible(), 8
    kept = {}
    for algorithm in ALGORITHMS:
        x, weight = torch.randn(visible.count, 16, b, b, requires_grad=True), torch.randn(16, 16, 3, 3)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: s.append((t.dtype, t.numel())) or t, lambda t: t
        ):
            convolve(x, weight, None, layer_axes(nn.Conv2d(16, 16, 3, padding=1)), 1, visible, algorithm)
        kept[algorithm] = sum(n for dtype, n in sizes if dtype == torch.float32)
    assert set(kept.values()) == {visible.count * 16 * b * b + 16 * 16 * 9}


@given(masks(), st.sampled_from([1, 2, 4]), st.integers(0, 10**6))
@settings(max_examples=30)
def test_a_window_shows_the_cells_around_its_patch(visible, b, seed):
    """A 3x3 window of every cell of a patch, beside `unfold` of the dense map."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(visible.count, 2, b, b, generator=generator)
    axes = layer_axes(nn.Conv2d(2, 2, 3, padding=1))
    windows = gather_windows(packed, axes, visible, fill=7.0)
    fill = torch.full((2,), 7.0)
    dense = nn.functional.pad(visible.unpack(packed, fill), (1, 1, 1, 1), value=7.0)
    expected = dense.unfold(2, b + 2, b).unfold(3, b + 2, b)  # (B, C, h, w, b + 2, b + 2)
    expected = expected.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)[visible.patches]
    assert torch.equal(windows, expected)


@given(st.integers(1, 6), st.integers(1, 4), st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_the_sum_of_what_was_gathered_is_the_transpose_of_gathering(n, c, picks):
    """<gather(x), y> = <x, gather_sum(y)>, index n being nothing."""
    table = torch.tensor([min(p, n) for p in picks])
    places = [[i for i, row in enumerate(table.tolist()) if row == cell] for cell in range(n)]
    width = max(1, *map(len, places))
    transposed = torch.tensor([p + [len(table)] * (width - len(p)) for p in places])
    x, y = torch.randn(n, c, dtype=torch.float64), torch.randn(len(table), c, dtype=torch.float64)
    torch.testing.assert_close((gather(x, table) * y).sum(), (x * gather_sum(y, transposed)).sum())
    assert (gather(x, torch.tensor([n]), fill=3.0) == 3).all()


def test_a_layer_that_stays_inside_its_patch_gathers_nothing():
    torch.manual_seed(0)
    visible, layer = some_visible(), nn.Conv2d(4, 8, 2, 2).double()
    runs = []
    for algorithm in ("halo", "im2col"):
        x = torch.randn(visible.count, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        y = convolve(x, layer.weight, layer.bias, layer_axes(layer), 1, visible, algorithm)
        runs.append([y, *torch.autograd.grad(y.square().sum(), [x, layer.weight, layer.bias])])
        made = {key[0] for key in visible._tables}
        assert made == ({"neighbourhood"} if algorithm == "halo" else {"neighbourhood", "window", "cell"})
    for got, expected in zip(*runs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
