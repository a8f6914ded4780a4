"""Global response normalisation of ConvNeXt V2 (Woo et al., CVPR 2023, section 4) in few passes over the cells.

With g the norm of a channel over the visible cells of an image, and n = g / (mean of g over channels + eps),

    y = x + weight * n * x + bias = (1 + weight * n) * x + bias

so one pass for g and one for y, and three backward, where autograd takes some fifteen over timm's terms. Under
autocast on a GPU a kernel takes these passes, and rounds y as the layer behind it would.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spark_fast.autograd import AutogradContext
from spark_fast.encoder.conv import kernels as gpu
from spark_fast.encoder.layers.per_image import GlobalReduction


class ResponseNorm(GlobalReduction):
    """Mixin: timm's GlobalResponseNorm over the visible cells of each image."""

    channel_dim: int
    eps: float
    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b), or (V, b, b, C) for a channels_last layer; the same shape comes back."""
        visible = self.context.visible
        if visible is None:
            return super().forward(x)
        cells = x if self.channel_dim == -1 else x.permute(0, 2, 3, 1)  # (V, b, b, C)
        if gpu.use_fused(self.context.kernels, cells):
            out = gpu.response_norm(cells, self.weight, self.bias, self.eps, visible.batch)
        else:
            rows = cells.reshape(visible.batch, -1, cells.shape[-1])  # (B, L*b*b, C)
            out = response_norm(rows, self.weight, self.bias, self.eps).view(cells.shape)
        return out if self.channel_dim == -1 else out.permute(0, 3, 1, 2)


def response_norm(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Global response normalisation.

    Args:
        rows: (B, N, C), the N cells of each image.
        weight, bias: (C,).

    Returns:
        (B, N, C), in the wider of the dtypes of `rows` and `weight`, as timm's layer.
    """
    out: Tensor = _ResponseNorm.apply(rows, weight, bias, eps)[0]
    return out


class _ResponseNorm(torch.autograd.Function):
    """Beside the output it returns g, which the backward pass needs."""

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(rows.dtype, weight.dtype)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=wide)  # (B, 1, C)
        ratio = norms / (norms.mean(-1, keepdim=True) + eps)
        return torch.addcmul(bias, rows, torch.addcmul(torch.ones_like(weight), weight, ratio)), norms

    @staticmethod
    def setup_context(ctx: AutogradContext, inputs: tuple, output: tuple) -> None:
        rows, weight, _, ctx.eps = inputs  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(output[1])  # type: ignore[attr-defined]
        ctx.save_for_backward(rows, weight, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: AutogradContext, grad: Tensor, _: Tensor) -> tuple:
        rows, weight, norms = ctx.saved_tensors
        mean = norms.mean(-1, keepdim=True) + ctx.eps  # type: ignore[attr-defined]
        ratio = norms / mean
        per_ratio = (grad * rows).sum(1, keepdim=True)  # (B, 1, C), times weight: the gradient of the ratio
        by_weight = weight * per_ratio
        grad_norms = (by_weight - (by_weight * ratio).mean(-1, keepdim=True)) / mean
        grad_rows = torch.addcmul(grad * (1 + weight * ratio), rows, _divide(grad_norms, norms))
        return grad_rows.to(rows.dtype), (per_ratio * ratio).sum((0, 1)), grad.sum((0, 1)), None


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0: a channel of zeros has no direction in which its norm grows."""
    return torch.where(b > 0, a / b, 0.0)
