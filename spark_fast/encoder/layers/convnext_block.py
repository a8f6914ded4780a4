"""The ConvNeXt block in as few passes over its cells as PyTorch's matrix products and the GPU kernels allow."""

from __future__ import annotations

from typing import Any

import timm.layers as tl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spark_fast.autograd import AutogradContext
from spark_fast.encoder.conv import kernels as gpu
from spark_fast.encoder.layers.timm_blocks import Block


class FusedConvNeXtBlock(Block):
    """timm's ConvNeXtBlock, V1 and V2; its own forward but for packed patches under autocast with the GPU kernels.

    There the two linear layers leave their biases to the kernels behind them (`kernels.pointwise_triton`), the block's
    input is rounded for its convolution by `_RoundBeside`, and the residual stream stays fp32, as under autocast.
    """

    conv_dw: nn.Module
    norm: nn.Module
    mlp: Any
    gamma: Tensor | None
    shortcut: nn.Module
    drop_path: nn.Module
    use_conv_mlp: bool

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b) -> (V, C', b', b'); a dense map while no patches are visible."""
        packed = self.context.visible is not None and not self.context.dense
        if not (packed and gpu.use_fused(self.context.kernels, x) and self._usual()):
            return super().forward(x)
        shortcut, dtype = x, torch.get_autocast_dtype(x.device.type)
        if x.dtype != dtype:
            shortcut, x = _RoundBeside.apply(x, dtype)
        rows = self._on_rows(self.norm, self.conv_dw(x).permute(0, 2, 3, 1))  # (V, b', b', C')
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        rows = gpu.gelu_of_sum(F.linear(rows, fc1.weight.flatten(1)), fc1.bias)
        if hasattr(self.mlp, "grn"):
            rows = self._on_rows(self.mlp.grn, rows)
        rows = F.linear(rows, fc2.weight.flatten(1))
        factor = None
        if not isinstance(self.drop_path, nn.Identity):
            factor = self.drop_path(rows.new_ones(len(rows), 1, 1, 1)).flatten()
        shortcut = self.shortcut(shortcut).permute(0, 2, 3, 1)
        return gpu.scaled_residual(rows, fc2.bias, self.gamma, factor, shortcut).permute(0, 3, 1, 2)

    def _on_rows(self, layer: nn.Module, rows: Tensor) -> Tensor:
        """A layer of the block, of maps where that is how it computes its MLP, on (V, b, b, C)."""
        if not self.use_conv_mlp:
            return layer(rows)
        return layer(rows.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _usual(self) -> bool:
        """Whether it is built of what the kernels compute: exact GELU, biases, no dropout."""
        mlp = self.mlp
        gelu = type(mlp.act) is tl.GELU or (type(mlp.act) is nn.GELU and mlp.act.approximate == "none")
        plain = isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity)
        return gelu and plain and mlp.fc1.bias is not None and not (self.training and (mlp.drop1.p or mlp.drop2.p))


class _RoundBeside(torch.autograd.Function):
    """x -> (x, x rounded to a dtype), whose gradients are added up in one pass: autocast would cast one first."""

    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return x.view_as(x), x.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple:
        return torch.add(*grads), None
