"""timm's residual blocks of ResNets, each norm computed together with what comes after it (`normalize`).

A norm cannot see the sum and the activation behind it: they stand in the block's `forward`, which is written again here
for packed patches. Where no kernel computes a norm, a Bottleneck still gains: a matrix product adds up the gradients of
its two ways. Everywhere else timm's own runs.
"""

from __future__ import annotations

from typing import Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spark_fast.autograd import AutogradContext, cast_for_autocast
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
        if self.context.visible is None or self.context.dense:
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
        shortcut = x if self.downsample is None else self.downsample(x)
        return self._last(self.bn2, self.act2, self.conv2(hidden), shortcut)


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions (timm.models.resnet.Bottleneck)."""

    conv3: nn.Module
    bn3: nn.Module
    act3: nn.Module

    def _fused(self, x: Tensor) -> Tensor:
        shortcut, hidden, downsample = self._fork(x)
        hidden = normalize(self.bn1, self.act1, hidden, None, self.context.kernels)
        hidden = self.aa(self._dropped(self.bn2, self.act2, self.conv2(hidden)))
        for layer in downsample:
            shortcut = layer(shortcut)
        return self._last(self.bn3, self.act3, self.conv3(hidden), shortcut)

    def _fork(self, x: Tensor) -> tuple[Tensor, Tensor, list[nn.Module]]:
        """The shortcut, what the first convolution gives, and the layers that the shortcut has still to pass."""
        narrow, wide, after = self.conv1, None, []
        if self.downsample is not None:
            wide, *after = self.downsample if isinstance(self.downsample, nn.Sequential) else [self.downsample]
        if not (_is_product(narrow, 1) and (wide is None or _is_product(wide))):
            return x, narrow(x), [] if self.downsample is None else [self.downsample]
        kernels = [conv.kernel().flatten(1) for conv in (narrow, wide) if conv is not None]
        cells, *weights = cast_for_autocast(x.permute(0, 2, 3, 1), *kernels)  # (V, b, b, C), (O, C)
        if wide is not None:
            shortcut, hidden = _TwoProducts.apply(cells, *reversed(weights), wide.stride[0])
        elif cells.dtype == x.dtype:
            shortcut, hidden = _ProductBesideInput.apply(cells, *weights)
        else:  # the shortcut keeps its own
            return x, narrow(x), []
        return shortcut.permute(0, 3, 1, 2), hidden.permute(0, 3, 1, 2), after


class _ProductBesideInput(torch.autograd.Function):
    """(V, b, b, C) and a weight (O, C) -> the input and its product with the weight, (V, b, b, O).

    The two gradients of the input are added up by the product that makes one of them: a pass over the map instead of
    three.
    """

    @staticmethod
    def forward(ctx: AutogradContext, cells: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cells, weight)
        return cells.view_as(cells), F.linear(cells, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: AutogradContext, beside: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        cells, weight = ctx.saved_tensors
        rows, grad, beside = (t.reshape(-1, t.shape[3]) for t in (cells, grad, beside))
        return torch.addmm(beside, grad, weight).view_as(cells), grad.t() @ rows


class _TwoProductsContext(AutogradContext, Protocol):
    stride: int


class _TwoProducts(torch.autograd.Function):
    """(V, b, b, C), (O, C), (N, C) -> products of every stride-th cell with the first weight, of all with the second.

    The gradient of the first is added in its cells alone: autograd would lay it out in a whole map, and add that.
    """

    @staticmethod
    def forward(
        ctx: _TwoProductsContext, cells: Tensor, wide: Tensor, narrow: Tensor, stride: int
    ) -> tuple[Tensor, Tensor]:
        picked = cells[:, ::stride, ::stride].contiguous()
        ctx.stride = stride
        ctx.save_for_backward(cells, picked, wide, narrow)
        return F.linear(picked, wide), F.linear(cells, narrow)

    @staticmethod
    @once_differentiable
    def backward(ctx: _TwoProductsContext, of_wide: Tensor, of_narrow: Tensor) -> tuple:
        cells, picked, wide, narrow = ctx.saved_tensors
        of_picked = of_wide @ wide
        of_wide, of_narrow = (grad.reshape(-1, grad.shape[3]) for grad in (of_wide, of_narrow))
        of_weights = of_wide.t() @ picked.flatten(0, 2), of_narrow.t() @ cells.flatten(0, 2)
        if ctx.stride == 1:
            return torch.addmm(of_picked.flatten(0, 2), of_narrow, narrow).view_as(cells), *of_weights, None
        of_cells = (of_narrow @ narrow).view_as(cells)
        of_cells[:, :: ctx.stride, :: ctx.stride] += of_picked
        return of_cells, *of_weights, None


def _is_product(layer: nn.Module, stride: int | None = None) -> TypeGuard[HaloConv]:
    """Whether it is a product over the cells, or over every stride-th."""
    return isinstance(layer, HaloConv) and layer.is_product and stride in (None, layer.stride[0])
