"""The masked encoder's layers: what lies in a hole reaches nothing, and statistics are those of the visible cells."""

import copy

import pytest
import timm.layers as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import grn
from torch import nn

from spark_fast.encoder import VisiblePatches
from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.convert_network import MASKED, convert_layers
from tests.encoder.masks import masks, some_visible

C, B = 8, 4


def converted(layer, visible):
    context = EncoderContext(dense=True)
    layer, _ = convert_layers(copy.deepcopy(layer), MASKED, context)
    context.visible = visible
    return layer.double()


def maps(visible, b=B):
    return torch.randn(visible.batch, C, visible.grid[0] * b, visible.grid[1] * b, dtype=torch.float64)


LAYERS = [
    nn.Conv2d(C, 4, 3, padding=1), nn.Conv2d(C, C, 5, 2, 2, groups=C), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 1, 1),
    tl.BlurPool2d(C), nn.BatchNorm2d(C), nn.GroupNorm(2, C), nn.Dropout2d(0.0), nn.AdaptiveAvgPool2d(1),
    nn.Sequential(nn.ConstantPad2d(1, 0.0), nn.MaxPool2d(3, 2)),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@settings(max_examples=10)
@given(visible=masks(), other=st.sampled_from([-1e3, 1e3]))
def test_the_content_of_a_hole_reaches_no_visible_cell(layer, visible, other):
    layer, x = converted(layer, visible), maps(visible)
    outputs = [layer(x), layer(x.masked_fill(~visible.cells(x.shape[2]), other))]
    if outputs[0].shape[2] > 1:  # else it is one cell per image
        outputs = [y.masked_fill(~visible.cells(y.shape[2]), 0) for y in outputs]
    assert torch.equal(*outputs)
    assert outputs[0].isfinite().all()


def test_batch_statistics_are_those_of_the_visible_cells_and_holes_come_out_zero():
    visible, norm = some_visible(), nn.BatchNorm2d(C)
    layer, x = converted(norm, visible), maps(some_visible()) * 3 + 1
    y, rows = layer(x), x.permute(0, 2, 3, 1)[visible.cells(x.shape[2])[:, 0]]
    torch.testing.assert_close(layer.running_mean, 0.1 * rows.mean(0))
    expected = (x - rows.mean(0)[:, None, None]) / (rows.var(0, unbiased=False)[:, None, None] + norm.eps).sqrt()
    torch.testing.assert_close(y, expected * visible.cells(x.shape[2]))


def test_a_compiled_maximum_of_holes_alone_does_not_read_from_the_padding():
    """Inductor took the place of the maximum of nothing to be in the padding, and the backward pass failed."""
    visible = VisiblePatches(torch.tensor([[3]]), (2, 2))  # the corner's windows are all hole or padding
    layer, x = converted(nn.MaxPool2d(3, 2, 1), visible), maps(visible).requires_grad_()
    gradients = []
    for run in (layer, torch.compile(layer)):
        x.grad = None
        run(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_a_maximum_of_holes_alone_is_zero_not_infinite_and_passes_no_gradient():
    visible = some_visible(keep=1)
    x = maps(visible).requires_grad_()
    y = converted(nn.MaxPool2d(2), visible)(x)
    assert y.isfinite().all()
    assert (y.masked_fill(visible.cells(y.shape[2]), 0) == 0).all()
    y.sum().backward()
    assert (x.grad.masked_fill(visible.cells(x.shape[2]), 0) == 0).all()


def test_a_reduction_of_a_channels_last_map_is_that_of_the_map_turned_round():
    visible = some_visible()
    last, first = (grn.GlobalResponseNorm(C, channels_last=flag) for flag in (True, False))
    for parameter in (*last.parameters(), *first.parameters()):
        nn.init.constant_(parameter, 0.5)
    x = maps(visible)
    got = converted(last, visible)(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(got, converted(first, visible)(x))
