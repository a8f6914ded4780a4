"""timm's residual blocks, written again: the same layers in the same order; by the kernels: `batch_norm_cases`."""

import pytest
import timm.layers as tl
import torch
from timm.models import resnet
from torch import nn

from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.convert_network import PACKED, convert_layers

BLOCKS = {
    "BasicBlock": lambda: resnet.BasicBlock(8, 8),
    "BasicBlock, stride 2": lambda: resnet.BasicBlock(8, 12, 2, resnet.downsample_avg(8, 12, 1, 2)),
    "Bottleneck": lambda: resnet.Bottleneck(8, 2),
    "Bottleneck, stride 2": lambda: resnet.Bottleneck(8, 4, 2, resnet.downsample_conv(8, 16, 1, 2)),
    "squeeze-and-excite, DropPath": lambda: resnet.Bottleneck(8, 2, attn_layer="se", drop_path=tl.DropPath(0.5)),
    "DropBlock, blur": lambda: resnet.BasicBlock(
        8, 8, 2, resnet.downsample_conv(8, 8, 1, 2), drop_block=lambda: nn.Dropout(0.3), aa_layer=tl.BlurPool2d
    ),
    "another activation": lambda: resnet.Bottleneck(8, 2, act_layer=nn.SiLU),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_written_again_is_timms_to_the_order_of_sums(name):
    results = []
    for written_again in (True, False):
        torch.manual_seed(0)
        block = convert_layers(BLOCKS[name](), PACKED, EncoderContext(dense=False))[0].double()
        x = torch.randn(6, 8, 4, 4, dtype=torch.float64).requires_grad_()
        torch.manual_seed(1)  # of what is dropped
        y = block._fused(x) if written_again else block(x)
        grads = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
        results.append([y, *grads, *block.buffers()])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
