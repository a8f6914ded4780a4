"""A layer that mixes an image sees the visible cells of that image, and of no other."""

import copy

import pytest
import timm.layers as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import grn
from torch import nn

from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.convert_network import PACKED, convert_layers
from tests.encoder.masks import masks, some_visible

C = 16
LAYERS = [nn.GroupNorm(4, C), nn.InstanceNorm2d(C, affine=True), tl.SEModule(C, rd_channels=4), tl.EcaModule(C)]


def converted(layer, visible):
    context = EncoderContext(dense=False)
    layer, _ = convert_layers(copy.deepcopy(layer), PACKED, context)
    context.visible = visible
    return layer.double()


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@settings(max_examples=15)
@given(visible=masks(), b=st.sampled_from([2, 4]))
def test_it_computes_what_the_layer_gives_for_the_visible_cells_as_one_picture(layer, visible, b):
    x = torch.randn(visible.count, C, b, b, dtype=torch.float64)
    got = converted(layer, visible)(x).unflatten(0, (visible.batch, visible.num_visible))
    for out, patches in zip(got, x.unflatten(0, (visible.batch, visible.num_visible)), strict=True):
        picture = torch.cat(list(patches), 1)[None]  # (L, C, b, b) -> (1, C, L*b, b)
        expected = torch.stack(layer.double()(picture)[0].split(b, 1))
        torch.testing.assert_close(out, expected)


def test_channels_last_layers_too():
    visible, layer = some_visible(), grn.GlobalResponseNorm(C, channels_last=True)
    nn.init.normal_(layer.weight)
    x = torch.randn(visible.count, 4, 4, C, dtype=torch.float64)
    got = converted(layer, visible)(x)
    expected = layer.double()(x.reshape(visible.batch, -1, 4, C)).reshape(x.shape)  # one tall picture each
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got, layer(x)), "per patch it is another thing"


def test_a_pooling_to_one_cell_is_the_same_for_every_patch_of_an_image():
    visible = some_visible()
    x = torch.randn(visible.count, C, 2, 2, dtype=torch.float64)
    for pool, reduce in ((nn.AdaptiveAvgPool2d(1), torch.mean), (nn.AdaptiveMaxPool2d(1), torch.amax)):
        expected = reduce(x.unflatten(0, (visible.batch, -1)), (1, 3, 4)).repeat_interleave(visible.num_visible, 0)
        torch.testing.assert_close(converted(pool, visible)(x), expected[..., None, None])


def test_stochastic_depth_drops_all_patches_of_an_image_or_none():
    visible = some_visible(batch=64)
    layer = converted(tl.DropPath(0.5), visible).train()
    out = layer(torch.ones(visible.count, 2, 2, 2)).unflatten(0, (visible.batch, visible.num_visible)).flatten(1)
    assert (out == out[:, :1]).all()
    assert set(out.unique().tolist()) == {0.0, 2.0}
