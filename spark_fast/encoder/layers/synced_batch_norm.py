"""Batch norms with statistics over all ranks, on any device.

Forward and backward are BatchNorm's own equations (Ioffe and Szegedy, 2015) with sums over all ranks in them: each
way two numbers per channel are exchanged, in one message. `torch.nn.SyncBatchNorm` runs on GPUs only, and there the
host waits for the device in every norm, to see whether a rank came without images; here every rank has equally many.
"""

from __future__ import annotations

from typing import Protocol

import timm.layers as tl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark_fast.autograd import AutogradContext
from spark_fast.exchange import count_ranks, gathered, mean_over_ranks


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with statistics over all ranks, each with equally many values; alone, it is BatchNorm2d."""

    @property
    def synced(self) -> bool:
        """Whether there are statistics to exchange."""
        return self.training and count_ranks() > 1

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        return self.normalized(x) if self.synced else super().forward(x)

    def normalized(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape, by the statistics of all ranks; updates the running statistics."""
        every = gathered(_moments(x.detach()))  # (ranks, 2, C)
        means, variances = every.unbind(1)
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square().mean(0)  # of equal parts, by Chan et al. (1979)
        if self.track_running_stats:
            count = x.numel() // x.shape[1] * len(every)
            self._track(mean, var * (count / (count - 1)))
        return _Normalize.apply(x, self.weight, self.bias, mean, var, self.eps)

    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        """Running statistics as BatchNorm2d keeps them."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(unbiased_var.to(self.running_var), share)


class SyncedBatchNormAct2d(tl.BatchNormAct2d, SyncedBatchNorm2d):
    """timm's BatchNormAct2d, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        return self.act(self.drop(self.normalized(x))) if self.synced else super().forward(x)


SYNCED: dict[type[nn.Module], type[SyncedBatchNorm2d]] = {
    nn.BatchNorm2d: SyncedBatchNorm2d,
    tl.BatchNormAct2d: SyncedBatchNormAct2d,
}


def sync_batch_norms(module: nn.Module) -> None:
    """Give every BatchNorm2d and BatchNormAct2d of a network, in place, the statistics of all ranks.

    Not their subclasses, which compute something else. Before the network is packed.
    """
    for layer in module.modules():
        if type(layer) in SYNCED:
            layer.__class__ = SYNCED[type(layer)]


def _moments(x: Tensor) -> Tensor:
    """Mean and biased variance of each channel, (2, C), fp32 or more precise."""
    # the kernel answers in the precision of the running statistics it is given, and updates them: these are not kept
    unused = x.new_zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.stack(torch.ops.aten.batch_norm_update_stats(x, unused[0], unused[1], 0.0))


class _Context(AutogradContext, Protocol):
    eps: float


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, where mean and var are those of x over all ranks."""

    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """w / s (g - mean(g) - n mean(g n)), with n the normalised input, s its deviation, means over all ranks."""
        (g,), (x, weight, mean, var) = grads, ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        _, gx, gs = torch.ops.aten.native_batch_norm_backward(
            g, x, scale, mean, var, None, None, False, ctx.eps, [False, True, True]
        )  # this rank's sums of g n and of g
        mean_gx, mean_g = mean_over_ranks(torch.stack([gx, gs])) / (x.numel() // x.shape[1])
        rate = (var + ctx.eps).rsqrt()
        of_g = (scale * rate)[:, None, None]
        of_x = of_g * (-mean_gx * rate)[:, None, None]
        rest = -of_g * mean_g[:, None, None] - of_x * mean[:, None, None]
        grad_x = torch.addcmul(rest, g, of_g).addcmul_(x, of_x).to(x.dtype)
        return grad_x, None if weight is None else gx, None if weight is None else gs, None, None, None
