"""How far a layer looks across the edge of a patch, beside what torch and timm compute."""

import pytest
import timm.layers as tl
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn

from spark_fast.encoder.conv.geometry import Axis, layer_axes

axes = st.builds(Axis, *(st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(0, 6), st.integers(0, 6)))


@given(axes, st.integers(1, 16))
def test_taps_are_the_inputs_of_each_output_and_lie_in_the_window(axis, outputs):
    assume(axis.hi >= 0)
    b = outputs * axis.stride
    taps, window = axis.taps(b), axis.window(b)
    expected = [o * axis.stride - axis.lo + t * axis.dilation for o in range(outputs) for t in range(axis.kernel)]
    assert list(taps) == expected
    assert len(window) == axis.lo + b + axis.hi
    assert min(taps) == window[0] == -axis.lo
    assert max(taps) == window[-1] == b - 1 + axis.hi
    furthest = max(axis.lo, axis.hi)
    assert (axis.patches(b) - 1) * b < furthest <= axis.patches(b) * b or furthest == axis.patches(b) == 0


@given(axes, st.booleans())
def test_a_layer_is_aligned_where_a_map_of_m_strides_becomes_one_of_m_cells(axis, ceil_mode):
    """By torch's own pooling, on maps of several sizes."""
    sizes = range(axis.reach, axis.reach + 4)  # the first of them has a window inside
    pool = nn.MaxPool2d((1, axis.kernel), (1, axis.stride), 0, (1, axis.dilation), ceil_mode=ceil_mode)
    padded = {m: torch.zeros(1, 1, 1, axis.lo + m * axis.stride + axis.end) for m in sizes}
    # ceil_mode's last window must begin inside the map: torch counts only its own padding as such, so the rest is left
    assume(not ceil_mode or axis.stride <= axis.reach)
    assert axis.aligned(ceil_mode) == all(pool(x).shape[3] == m for m, x in padded.items())


@pytest.mark.parametrize(
    ("layer", "y", "x"),
    [
        (nn.Conv2d(1, 1, 3, 2, 1), (3, 2, 1, 1, 1), (3, 2, 1, 1, 1)),
        (nn.Conv2d(1, 1, (1, 7), padding=(0, 3)), (1, 1, 1, 0, 0), (7, 1, 1, 3, 3)),
        (nn.Conv2d(1, 1, 3, padding="same", dilation=2), (3, 1, 2, 2, 2), (3, 1, 2, 2, 2)),
        (nn.Conv2d(1, 1, 1, padding="valid"), (1, 1, 1, 0, 0), (1, 1, 1, 0, 0)),
        (tl.Conv2dSame(1, 1, 3, 2), (3, 2, 1, 0, 1), (3, 2, 1, 0, 1)),
        (tl.Conv2dSame(1, 1, 5, 2), (5, 2, 1, 1, 2), (5, 2, 1, 1, 2)),
        (MaxPool2dSame(3, 2), (3, 2, 1, 0, 1), (3, 2, 1, 0, 1)),
        (nn.AvgPool2d(2), (2, 2, 1, 0, 0), (2, 2, 1, 0, 0)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_the_axes_of_a_layer(layer, y, x):
    assert layer_axes(layer) == (Axis(*y), Axis(*x))


def test_padding_taken_over_is_added_on_its_sides():
    y, x = layer_axes(nn.Conv2d(1, 1, 3, padding=1), folded_padding=(1, 2, 3, 4))  # left, right, top, bottom
    assert (y.lo, y.end) == (1 + 3, 1 + 4)
    assert (x.lo, x.end) == (1 + 1, 1 + 2)
