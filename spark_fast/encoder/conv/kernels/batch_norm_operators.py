"""Batch norms as operators of `torch.library`, with their gradient: which kernels run, over which tiles.

The mathematics, and what each kernel reads and writes: `batch_norm_triton`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spark_fast.autograd import AutogradContext
from spark_fast.encoder.conv.kernels.batch_norm_triton import (
    apply_kernel,
    input_gradient_kernel,
    merge_kernel,
    statistics_kernel,
    sums_kernel,
)
from spark_fast.encoder.conv.kernels.operator import operator
from spark_fast.encoder.conv.kernels.tile import PROCESSORS, channel_tile, map_like, map_rows, on_device
from spark_fast.exchange import mean_over_ranks

WARPS = 4
TILE = 4096  # elements of a program's tile: 32 a thread
MERGED = 16  # channels of a program that merges statistics: so that there is more than one


@operator(
    "(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, float momentum, "
    "float eps) -> (Tensor, Tensor)"
)
def batch_norm_statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None, momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean and 1 / sqrt(var + eps) of each channel, (C,) fp32, without a gradient.

    Args:
        x: (N, C, H, W), fp32, bf16 or fp16, of more than one row.
        running_mean, running_var: (C,), become momentum * new + (1 - momentum) * old, the variance unbiased.
        batches: () int64, counts this batch. All three, or none of them.

    Raises:
        ValueError: too many rows.
    """
    found = _channels_like(x, running_mean, running_var, batches, momentum, eps)
    tracked = None if running_mean is None else (running_mean, running_var, batches)
    _statistics_of(x, found, tracked, momentum, eps)
    return found


@operator("(Tensor x) -> Tensor")
def batch_norm_moments(x: Tensor) -> Tensor:
    """Mean and sum of squared deviations of each channel, (2, C) fp32, for `batch_norm_merge`; without a gradient.

    Args:
        x: as for `batch_norm_statistics`.
    """
    moments = _moments_like(x)
    _statistics_of(x, moments.unbind(), None, 0.0, 0.0, final=False)
    return moments


@operator(
    "(Tensor moments, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, int rows, "
    "float momentum, float eps) -> (Tensor, Tensor)"
)
def batch_norm_merge(
    moments: Tensor, running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None, rows: int,
    momentum: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `batch_norm_statistics`, two (C,), of the maps of R ranks together.

    Args:
        moments: (R, 2, C), of `batch_norm_moments`.
        running_mean, running_var, batches: as for `batch_norm_statistics`.
        rows: of the map of each rank.
    """
    found = _merged_like(moments)
    tracked = None if running_mean is None else (running_mean, running_var, batches)
    _merge(None, moments.contiguous(), found, tracked, len(moments) * rows, rows, momentum, eps)
    return found


def _statistics_of(
    x: Tensor, into: tuple[Tensor, ...], tracked: tuple[Tensor | None, ...] | None, momentum: float, eps: float, *,
    final: bool = True,
) -> None:  # fmt: skip
    """Launch the kernels that find the statistics of a map (N, C, H, W), run by run and then of all runs."""
    x, channels, rows = map_rows(x), x.shape[1], x.numel() // x.shape[1]
    tile_rows, tile, tiles, runs = _runs(rows, channels, 4)
    partial = x.new_empty(runs, 2, channels, dtype=torch.float32)
    with on_device(x):
        statistics_kernel[(runs * -(-channels // tile),)](
            x, partial, rows, tiles, *_units(channels), tile_rows, tile, num_warps=WARPS
        )
    _merge(x, partial, into, tracked, rows, tiles * tile_rows, momentum, eps, final=final)


def _merge(
    x: Tensor | None, partial: Tensor, into: tuple[Tensor, ...], tracked: tuple[Tensor | None, ...] | None, rows: int,
    run_rows: int, momentum: float, eps: float, *, final: bool = True,
) -> None:  # fmt: skip
    """Launch `merge_kernel`; `x`: from whose first row the means of `partial` are counted."""
    runs, _, channels = partial.shape
    with on_device(partial):
        merge_kernel[(-(-channels // MERGED),)](
            partial if x is None else x, partial, *into, *(tracked or into[:1] * 3), rows, runs, run_rows, momentum,
            eps, *_units(channels), x is not None, final, tracked is not None, 64, MERGED, num_warps=WARPS,
        )  # fmt: skip
    torch.autograd.graph.increment_version([t for t in tracked or () if t is not None])


@operator(
    "(Tensor x, Tensor? residual, Tensor mean, Tensor inverse, Tensor? weight, Tensor? bias, str activation) -> Tensor"
)
def batch_norm_apply(
    x: Tensor, residual: Tensor | None, mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None,
    activation: str,
) -> Tensor:  # fmt: skip
    """activation((x - mean) * inverse * weight + bias + residual).

    Args:
        x, residual: (N, C, H, W), of one dtype, in which the output is rounded once.
        mean, inverse: (C,), what `batch_norm_statistics` gives for this x.
        weight, bias: (C,), or neither.
        activation: "relu", "relu6", or "": none.
    """
    x, out = map_rows(x), map_like(x)
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    tile_rows, tile, programs = _tiles(rows, channels)
    with on_device(x):
        apply_kernel[(programs,)](
            x, x if residual is None else map_rows(residual), *_affine(mean, inverse, weight, bias), out, rows,
            *_units(channels), weight is not None, residual is not None, activation, tile_rows, tile, num_warps=WARPS,
        )  # fmt: skip
    return out


@operator(
    "(Tensor grad, Tensor x, Tensor? y, Tensor mean, Tensor inverse, Tensor? weight, Tensor? bias, "
    "str activation) -> (Tensor, Tensor)"
)
def batch_norm_sums(
    grad: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, inverse: Tensor, weight: Tensor | None,
    bias: Tensor | None, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of bias and weight, (2, C) fp32, and the gradient before the activation, (N, C, H, W).

    Args:
        grad: the gradient of the output, (N, C, H, W).
        y: the output (N, C, H, W), where there was a residual. None: which elements passed the activation is
            computed again from x, and the gradient before it is not written: the second result is empty, (0,).
        x, mean, inverse, weight, bias, activation: as for `batch_norm_apply`.
    """
    grad, x = map_rows(grad), map_rows(x)
    passed = map_like(x) if y is not None else x.new_empty(0)
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    tile_rows, tile, tiles, runs = _runs(rows, channels, 3)
    partial = mean.new_empty(runs, 2, channels)
    with on_device(x):
        sums_kernel[(runs * -(-channels // tile),)](
            grad, x, x if y is None else map_rows(y), *_affine(mean, inverse, weight, bias), passed, partial, rows,
            tiles, *_units(channels), weight is not None, y is not None, activation, tile_rows, tile, num_warps=WARPS,
        )  # fmt: skip
    return partial.sum(0), passed


@operator(
    "(Tensor grad, Tensor x, Tensor mean, Tensor inverse, Tensor? weight, Tensor? bias, Tensor sums, "
    "str activation) -> Tensor"
)
def batch_norm_input_gradient(
    grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None, sums: Tensor,
    activation: str,
) -> Tensor:  # fmt: skip
    """The gradient of `batch_norm_apply` with respect to x, (N, C, H, W).

    Args:
        grad: the gradient of the output, (N, C, H, W).
        sums: (2, C), of `batch_norm_sums`.
        activation: "" if `grad` is the gradient before the activation already.
        x, mean, inverse, weight, bias: as for `batch_norm_apply`.
    """
    grad, x, out = map_rows(grad), map_rows(x), map_like(x)
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    tile_rows, tile, programs = _tiles(rows, channels)
    with on_device(x):
        input_gradient_kernel[(programs,)](
            grad, x, *_affine(mean, inverse, weight, bias), sums, out, rows, *_units(channels), weight is not None,
            activation, tile_rows, tile, num_warps=WARPS,
        )  # fmt: skip
    return out


def _affine(mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
    """The arguments of the kernels; a missing weight or bias is replaced by a tensor that they do not read."""
    return mean, inverse, *(mean if of_channel is None else of_channel.contiguous() for of_channel in (weight, bias))


def _units(channels: int) -> tuple[int, int]:
    """Channels as a product: a factor given at run time, and one of at most 8 that the kernel is compiled for."""
    unit = min(channels & -channels, 8)
    return channels // unit, unit


def _tiles(rows: int, channels: int) -> tuple[int, int, int]:
    """Rows and channels of a tile, and how many there are."""
    tile = channel_tile(channels)
    tile_rows = TILE // tile
    return tile_rows, tile, -(-rows // tile_rows) * -(-channels // tile)


def _runs(rows: int, channels: int, resident: int) -> tuple[int, int, int, int]:
    """Rows and channels of a tile, tiles of a run, and runs: none is empty.

    All run at once, `resident` programs on each processor, as their registers allow: none waits for another to end.
    """
    tile_rows, tile, _ = _tiles(rows, channels)
    all_tiles = -(-rows // tile_rows)
    tiles = -(-all_tiles // min(all_tiles, max(1, resident * PROCESSORS // -(-channels // tile))))
    return tile_rows, tile, tiles, -(-all_tiles // tiles)


@torch.library.register_fake(batch_norm_statistics)
def _channels_like(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None, momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape[1], dtype=torch.float32), x.new_empty(x.shape[1], dtype=torch.float32)


@torch.library.register_fake(batch_norm_moments)
def _moments_like(x: Tensor) -> Tensor:
    return x.new_empty(2, x.shape[1], dtype=torch.float32)


@torch.library.register_fake(batch_norm_merge)
def _merged_like(moments: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return moments.new_empty(moments.shape[2]), moments.new_empty(moments.shape[2])


torch.library.register_fake(batch_norm_apply, lambda x, *rest: map_like(x))
torch.library.register_fake(batch_norm_input_gradient, lambda grad, x, *rest: map_like(x))


@torch.library.register_fake(batch_norm_sums)
def _sums_like(grad: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return mean.new_empty(2, x.shape[1]), map_like(x) if y is not None else x.new_empty(0)


class _Context(AutogradContext, Protocol):
    activation: str
    residual: bool
    synced: bool


class _BatchNorm(torch.autograd.Function):
    """`batch_norm_apply` with its gradient, which counts that the statistics are those of x, or of all ranks' x."""

    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, residual: Tensor | None, mean: Tensor, inverse: Tensor, weight: Tensor | None,
        bias: Tensor | None, activation: str, synced: bool,
    ) -> Tensor:  # fmt: skip
        out = batch_norm_apply(x, residual, mean, inverse, weight, bias, activation)
        ctx.activation, ctx.residual, ctx.synced = activation, residual is not None, synced
        ctx.save_for_backward(x, mean, inverse, weight, bias, out if ctx.residual and activation else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple:
        x, mean, inverse, weight, bias, y = ctx.saved_tensors
        sums, passed = batch_norm_sums(grad, x, y, mean, inverse, weight, bias, ctx.activation)
        through, activation = (grad, ctx.activation) if y is None else (passed, "")
        of_all = mean_over_ranks(sums) if ctx.synced else sums
        grad_x = batch_norm_input_gradient(through, x, mean, inverse, weight, bias, of_all, activation)
        of_weight = None if weight is None else sums[1].to(weight.dtype)
        of_bias = None if bias is None else sums[0].to(bias.dtype)
        return grad_x, through if ctx.residual else None, None, None, of_weight, of_bias, None, None


batch_norm_with_gradient = _BatchNorm.apply
