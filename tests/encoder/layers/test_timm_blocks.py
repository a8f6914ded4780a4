"""Reimplemented blocks of timm: the block itself where nothing is masked; packed is masked where something is."""

import copy

import pytest
import timm.layers as tl
import torch
from timm.models import _efficientnet_blocks, convnext, focalnet, hgnet, resnet
from torch import nn

from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.convert_network import MASKED, PACKED, convert_layers
from spark_fast.encoder.layer_registry import BLOCKS
from tests.encoder.masks import some_visible

CASES = {  # block, channels of its input, cells per patch
    "SplitAttn": (tl.SplitAttn(8, norm_layer=nn.BatchNorm2d), 8, 4),
    "SplitAttn, stride 2": (tl.SplitAttn(8, stride=2, padding=1, radix=1), 8, 4),
    "FocalModulation": (focalnet.FocalModulation(8, focal_window=3, focal_level=2), 8, 4),
    "FocalModulation, normalised": (focalnet.FocalModulation(8, 3, 2, normalize_modulator=True), 8, 2),
    "CondConvResidual": (_efficientnet_blocks.CondConvResidual(8, 8, exp_ratio=2.0, num_experts=3), 8, 4),
    "StemV2": (hgnet.StemV2(3, 8, 8), 3, 16),
    "ConvNeXtBlock": (convnext.ConvNeXtBlock(8, ls_init_value=0.5), 8, 4),
    "ConvNeXtBlock, GRN": (convnext.ConvNeXtBlock(8, ls_init_value=None, use_grn=True, conv_mlp=True), 8, 2),
    "BasicBlock": (resnet.BasicBlock(8, 8), 8, 4),
    "Bottleneck": (resnet.Bottleneck(8, 4, stride=2, downsample=resnet.downsample_conv(8, 16, 1, 2)), 8, 4),
}
BUILT = {name: torch.manual_seed(0) and case for name, case in CASES.items()}


def converted(block, table, visible):
    context = EncoderContext(dense=table is MASKED)
    made, _ = convert_layers(copy.deepcopy(block), table, context)
    context.visible = visible
    return made.double().eval()


def maps(visible, c, b):
    h, w = visible.grid
    generator = torch.Generator().manual_seed(1)
    return torch.randn(visible.batch, c, h * b, w * b, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_where_nothing_is_masked_it_is_the_block(name):
    block, c, b = CASES[name]
    visible = some_visible((2, 3), keep=6)
    x = maps(visible, c, b)
    expected = copy.deepcopy(block).double().eval()(x)
    torch.testing.assert_close(visible.unpack(converted(block, PACKED, visible)(visible.pack(x))), expected)
    torch.testing.assert_close(converted(block, MASKED, visible)(x), expected)
    torch.testing.assert_close(converted(block, PACKED, None)(x), expected)


@pytest.mark.parametrize("name", CASES)
def test_where_something_is_masked_packed_is_masked_and_holes_do_not_matter(name):
    block, c, b = CASES[name]
    visible = some_visible((2, 3), keep=4)
    x = maps(visible, c, b)
    packed = converted(block, PACKED, visible)(visible.pack(x))
    for fill in (0.0, 1e3):
        masked = converted(block, MASKED, visible)(x.masked_fill(~visible.cells(x.shape[2]), fill))
        torch.testing.assert_close(packed, visible.pack(masked))
    dense = copy.deepcopy(block).double().eval()(x)
    assert not torch.allclose(packed, visible.pack(dense)), "the mask must matter"


def test_a_choice_among_kernels_is_one_per_image():
    attention = tl.selective_kernel.SelectiveKernelAttn(8, num_paths=2, attn_channels=8)
    visible = some_visible((2, 3), keep=4)
    paths = torch.stack([maps(visible, 8, 2), maps(visible, 8, 2).flip(1)], 1)  # (B, paths, C, H, W)
    packed = torch.stack([visible.pack(p) for p in paths.unbind(1)], 1)  # (V, paths, C, b, b)
    got = converted(attention, PACKED, visible)(packed)
    expected = converted(attention, MASKED, visible)(paths)
    torch.testing.assert_close(got, expected.repeat_interleave(visible.num_visible, 0))


def test_every_block_is_shown_here_or_used_by_one_that_is():
    shown = {type(module) for block, _, _ in CASES.values() for module in block.modules()}
    assert set(BLOCKS) - shown == {tl.selective_kernel.SelectiveKernelAttn}
