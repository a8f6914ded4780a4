"""Batch statistics over all ranks, on the CPU (`nn.SyncBatchNorm` runs on GPUs only).

Forward and backward are BatchNorm's own equations (Ioffe and Szegedy, 2015) with sums over all ranks in them: each
way two numbers per channel are exchanged, in one message, and torch's kernels pass over the tensor.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from spark_fast.autograd import AutogradContext
from spark_fast.encoder.layers.batch_norm import PackedBatchNorm


class HostSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d with statistics over all ranks, each of which brings the same number of values."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        if not self.training:
            return super().forward(x)
        mean, var = _statistics(x.detach())
        count = x.numel() // x.shape[1] * dist.get_world_size()
        self._track(mean, var * (count / (count - 1)))
        return _Normalize.apply(x, self.weight, self.bias, mean, var, self.eps)

    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        """Running statistics as BatchNorm2d keeps them."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_(unbiased_var.to(self.running_var), self.momentum)

    @classmethod
    def replace_in(cls, module: nn.Module) -> None:
        """Turn every plain BatchNorm2d below `module` into one of these, packed ones too, parameters shared."""
        for name, child in module.named_children():
            packed = isinstance(child, PackedBatchNorm) and child.original_type() is nn.BatchNorm2d
            if isinstance(child, nn.BatchNorm2d) and (packed or type(child) is nn.BatchNorm2d):
                synced = cls(child.num_features, child.eps, child.momentum)
                synced.__dict__.update(child.__dict__)
                setattr(module, name, synced)
            else:
                cls.replace_in(child)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over all ranks, (C,) each: of equal parts, by Chan et al. (1979)."""
    # the kernel answers in the precision of the running statistics it is given, and updates them: these are not kept
    unused = x.new_zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    own = torch.stack(torch.ops.aten.batch_norm_update_stats(x, unused[0], unused[1], 0.0))
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    means, variances = torch.stack(every).unbind(1)
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


class _Context(AutogradContext, Protocol):
    eps: float


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, where mean and var are those of x over all ranks."""

    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """w / s (g - mean(g) - n mean(g n)), with n the normalised input, s its deviation, means over all ranks."""
        (g,), (x, weight, mean, var) = grads, ctx.saved_tensors
        _, gx, gs = torch.ops.aten.native_batch_norm_backward(
            g, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
        )  # this rank's sums of g n and of g
        sums = torch.stack([gx, gs])
        dist.all_reduce(sums)
        mean_gx, mean_g = sums / (x.numel() // x.shape[1] * dist.get_world_size())
        rate = (var + ctx.eps).rsqrt()
        of_g = (weight * rate)[:, None, None]
        of_x = of_g * (-mean_gx * rate)[:, None, None]
        rest = -of_g * mean_g[:, None, None] - of_x * mean[:, None, None]
        return torch.addcmul(rest, g, of_g).addcmul_(x, of_x).to(x.dtype), gx, gs, None, None, None
