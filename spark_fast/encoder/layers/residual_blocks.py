"""timm's residual blocks of ResNets, each norm computed together with what comes after it (`normalize`).

A norm cannot see the sum and the activation behind it: they stand in the block's `forward`, which is written again here
for packed patches and where the kernels of batch norms run. Everywhere else timm's own runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spark_fast.autograd import AutogradContext, cast_for_autocast
from spark_fast.encoder.conv.kernels import use_kernels
from spark_fast.encoder.layers.batch_norm import normalize
from spark_fast.encoder.layers.halo import HaloConv
from spark_fast.encoder.layers.timm_blocks import Block


class ResidualBlock(Block):
    """Base of both: the last convolution's norm, the shortcut, the last activation."""

    conv1: nn.Module
    conv2: nn.Module
    bn1: nn.Module
    bn2: nn.Module
    act1: nn.Module
    act2: nn.Module
    drop_block: nn.Module
    aa: nn.Module
    se: nn.Module | None
    drop_path: nn.Module | None
    downsample: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b) -> (V, C', b/stride, b/stride)."""
        if self.context.visible is None or self.context.dense or not use_kernels(self.context.kernels, x):
            return super().forward(x)
        return self._fused(x)

    def _fused(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _dropped(self, norm: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
        """A norm, the block's dropping of regions, an activation."""
        kernels = self.context.kernels
        if type(self.drop_block) is nn.Identity:
            return normalize(norm, activation, x, None, kernels)
        return activation(self.drop_block(norm(x)))

    def _last(self, norm: nn.Module, activation: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
        """The norm of what the convolutions give, plus the shortcut, activated."""
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        if self.se is None and self.drop_path is None:
            return normalize(norm, activation, x, shortcut, self.context.kernels)
        x = norm(x)
        for layer in (self.se, self.drop_path):
            x = x if layer is None else layer(x)
        x += shortcut
        return activation(x)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions (timm.models.resnet.BasicBlock)."""

    def _fused(self, x: Tensor) -> Tensor:
        hidden = self.aa(self._dropped(self.bn1, self.act1, self.conv1(x)))
        return self._last(self.bn2, self.act2, self.conv2(hidden), x)


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions (timm.models.resnet.Bottleneck)."""

    conv3: nn.Module
    bn3: nn.Module
    act3: nn.Module

    def _fused(self, x: Tensor) -> Tensor:
        x, hidden = self._fork(x)
        hidden = normalize(self.bn1, self.act1, hidden, None, self.context.kernels)
        hidden = self.aa(self._dropped(self.bn2, self.act2, self.conv2(hidden)))
        return self._last(self.bn3, self.act3, self.conv3(hidden), x)

    def _fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The shortcut and what the first convolution gives."""
        conv = self.conv1
        if self.downsample is not None or not (isinstance(conv, HaloConv) and conv.is_product):
            return x, conv(x)
        cells, weight = cast_for_autocast(x.permute(0, 2, 3, 1), conv.kernel().flatten(1))  # (V, b, b, C), (O, C)
        if cells.dtype != x.dtype:  # the shortcut keeps its own
            return x, conv(x)
        shortcut, out = _ProductBesideInput.apply(cells.reshape(-1, cells.shape[3]), weight)
        return tuple(rows.view(*cells.shape[:3], -1).permute(0, 3, 1, 2) for rows in (shortcut, out))


class _ProductBesideInput(torch.autograd.Function):
    """(N, C) and a weight (O, C) -> the input and its product with the weight, (N, O).

    The two gradients of the input are added up by the product that makes one of them: a pass over the map instead of
    three.
    """

    @staticmethod
    def forward(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return rows.view_as(rows), F.linear(rows, weight)

    @staticmethod
    def setup_context(ctx: AutogradContext, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: AutogradContext, beside: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        return torch.addmm(beside, grad, weight), grad.t() @ rows
