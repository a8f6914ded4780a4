"""Batch norm by the statistics of the batch, with the sum and the ReLU after it, in the fewest passes over memory.

    y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

of maps (N, C, H, W) in channels_last: n = N*H*W rows of C channels. Statistics, weights and sums are fp32. Written and
read, in times the map; PyTorch takes 3 and 5 for the norm alone, 2 and 3 for a ReLU in place, 3 for the sum:

    statistics      read x                                   1
    apply           read x (residual), write y               2 (3)
    sums            read grad, x                             2      with a residual: read y too, write the gradient that
                                                                    passes the activation, which is the residual's: 4
    input gradient  read grad, x, write                      3

The statistics are of the whole batch, so x is read twice, and so are gradient and x backward: no order of the work
saves that. Nothing is kept for the backward pass but x and, behind a residual, y, which the next layer keeps anyway;
elsewhere the backward pass computes again from x what the activation has let through.

Variances are exact where the mean is much the larger: a thread keeps the mean and the squared deviations of the values
that it has seen (Welford, 1962), and parts are merged by their means (Chan et al., 1979). All sums have a fixed order:
no atomics, the same bits every time.

Worked example: the widest maps of ResNet-50, 224 px, batch 256, mask 0.6 (n = 5120*64, C = 256, bf16: 168 MB), norm,
shortcut and ReLU: 4 and 7 times the map instead of 8 and 8, 0.55 ms instead of 0.80 at the 3.35 TB/s of an H100.
"""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from spark_fast.autograd import AutogradContext
from spark_fast.encoder.conv.kernels.tile import WAVES, at, channel_tile, my_tile, on_device, rows_of

WARPS = 4
TILE = 4096  # elements of a program's tile: 32 a thread
MERGED = 16  # channels of a program that merges statistics: so that there is more than one


@triton.jit
def _statistics_kernel(x, partial, N, RUN, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean, counted from the first row of all, and squared deviations of CHANNELS over RUN tiles of ROWS rows.

    That row is near the mean where the mean is far from 0, so that no digits are lost.
    """
    run, c = my_tile(C, CHANNELS)
    in_c = c < C
    first = run * RUN * ROWS + tl.arange(0, ROWS)
    base = tl.load(x + c, mask=in_c, other=0.0).to(tl.float32)
    mean = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for tile in range(RUN):
        row = first + tile * ROWS
        inside = (row < N)[:, None] & in_c[None, :]
        value = tl.load(at(x, row, c, C), mask=inside, other=0.0).to(tl.float32) - base[None, :]
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta * (1.0 / (tile + 1))
        squares += delta * (value - mean)
    counts = tl.minimum(tl.maximum((N - first + ROWS - 1) // ROWS, 0), RUN).to(tl.float32)[:, None]
    total = tl.sum(counts * mean, 0) / tl.sum(counts)
    between = mean - total[None, :]
    place = partial + run * (2 * C) + c
    tl.store(place, total, mask=in_c)
    tl.store(place + C, tl.sum(squares + counts * between * between, 0), mask=in_c)


@triton.jit
def _merge_kernel(
    x, partial, mean, inverse, running_mean, running_var, batches, N, RUNS, RUN_ROWS, momentum, eps,
    C: tl.constexpr, TRACKED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(var + eps) of all rows, from those of RUNS runs; the running statistics, in place."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    in_c = c < C
    total = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, RUNS, ROWS):
        run = first + tl.arange(0, ROWS)
        rows = tl.minimum(tl.maximum(N - run * RUN_ROWS, 0), RUN_ROWS).to(tl.float32)[:, None]
        means = tl.load(at(partial, run, c, 2 * C), mask=(run < RUNS)[:, None] & in_c[None, :], other=0.0)
        total += tl.sum(rows * means, 0)
    centre = total / N
    squares = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, RUNS, ROWS):
        run = first + tl.arange(0, ROWS)
        rows = tl.minimum(tl.maximum(N - run * RUN_ROWS, 0), RUN_ROWS).to(tl.float32)[:, None]
        inside = (run < RUNS)[:, None] & in_c[None, :]
        between = tl.load(at(partial, run, c, 2 * C), mask=inside, other=0.0) - centre[None, :]
        within = tl.load(at(partial + C, run, c, 2 * C), mask=inside, other=0.0)
        squares += tl.sum(within + rows * between * between, 0)
    centre += tl.load(x + c, mask=in_c, other=0.0).to(tl.float32)
    tl.store(mean + c, centre, mask=in_c)
    tl.store(inverse + c, 1.0 / tl.sqrt(squares / N + eps), mask=in_c)
    if TRACKED:
        old = tl.load(running_mean + c, mask=in_c, other=0.0).to(tl.float32)
        tl.store(running_mean + c, momentum * centre + (1 - momentum) * old, mask=in_c)
        old = tl.load(running_var + c, mask=in_c, other=0.0).to(tl.float32)
        tl.store(running_var + c, momentum * (squares / (N - 1)) + (1 - momentum) * old, mask=in_c)
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + 1)


@triton.jit
def _of_channels(mean, inverse, weight, bias, c, C: tl.constexpr, AFFINE: tl.constexpr):
    """Of each channel, (1, channels): mean, 1 / std, what a deviation is multiplied by, and what is added."""
    in_c = c < C
    centre = tl.load(mean + c, mask=in_c, other=0.0)[None, :]
    std = tl.load(inverse + c, mask=in_c, other=0.0)[None, :]
    scale, shift = std, tl.zeros_like(std)
    if AFFINE:
        scale = std * tl.load(weight + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
        shift = tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    return centre, std, scale, shift


@triton.jit
def _apply_kernel(
    x, residual, mean, inverse, weight, bias, out, N, C: tl.constexpr, AFFINE: tl.constexpr, RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of the output."""
    tile, c = my_tile(C, CHANNELS)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = (row < N)[:, None] & (c < C)[None, :]
    centre, _, scale, shift = _of_channels(mean, inverse, weight, bias, c, C, AFFINE)
    z = (tl.load(at(x, row, c, C), mask=inside, other=0.0).to(tl.float32) - centre) * scale + shift
    if RESIDUAL:
        z += tl.load(at(residual, row, c, C), mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        z = tl.where(z <= 0.0, 0.0, z)  # by comparisons, so that NaN stays NaN
    if ACTIVATION == "relu6":
        z = tl.where(z >= 6.0, 6.0, z)
    tl.store(at(out, row, c, C), z, mask=inside)


@triton.jit
def _let_through(grad, z, ACTIVATION: tl.constexpr):
    """The gradient behind the activation, from its input or its output: 0 at its limits and beyond."""
    if ACTIVATION != "":
        grad = tl.where(z <= 0.0, 0.0, grad)
    if ACTIVATION == "relu6":
        grad = tl.where(z >= 6.0, 0.0, grad)
    return grad


@triton.jit
def _sums_kernel(
    grad, x, y, mean, inverse, weight, bias, passed, partial, N, RUN, C: tl.constexpr, AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradients of bias and weight over RUN tiles of ROWS rows; with RESIDUAL, the gradient that passes is kept."""
    run, c = my_tile(C, CHANNELS)
    in_c = c < C
    centre, std, scale, shift = _of_channels(mean, inverse, weight, bias, c, C, AFFINE)
    of_bias = tl.zeros((ROWS, CHANNELS), tl.float32)
    of_weight = tl.zeros((ROWS, CHANNELS), tl.float32)
    for tile in range(RUN):
        row = (run * RUN + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < N)[:, None] & in_c[None, :]
        upstream = tl.load(at(grad, row, c, C), mask=inside, other=0.0)
        deviation = tl.load(at(x, row, c, C), mask=inside, other=0.0).to(tl.float32) - centre
        if RESIDUAL:
            upstream = _let_through(upstream, tl.load(at(y, row, c, C), mask=inside, other=0.0), ACTIVATION)
            tl.store(at(passed, row, c, C), upstream, mask=inside)
        else:
            upstream = _let_through(upstream, (deviation * scale + shift).to(x.dtype.element_ty), ACTIVATION)
        of_bias += upstream.to(tl.float32)
        of_weight += upstream.to(tl.float32) * deviation
    place = partial + run * (2 * C) + c
    tl.store(place, tl.sum(of_bias, 0), mask=in_c)
    tl.store(place + C, tl.sum(of_weight * std, 0), mask=in_c)


@triton.jit
def _input_gradient_kernel(
    grad, x, mean, inverse, weight, bias, sums, out, N, C: tl.constexpr, AFFINE: tl.constexpr,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of the input's gradient: scale * (grad - its mean - normalised x * the mean of grad * normalised x)."""
    tile, c = my_tile(C, CHANNELS)
    row, in_c = tile * ROWS + tl.arange(0, ROWS), c < C
    inside = (row < N)[:, None] & in_c[None, :]
    centre, std, scale, shift = _of_channels(mean, inverse, weight, bias, c, C, AFFINE)
    along = tl.load(sums + c, mask=in_c, other=0.0)[None, :] / N
    slope = std * tl.load(sums + C + c, mask=in_c, other=0.0)[None, :] / N
    upstream = tl.load(at(grad, row, c, C), mask=inside, other=0.0)
    deviation = tl.load(at(x, row, c, C), mask=inside, other=0.0).to(tl.float32) - centre
    upstream = _let_through(upstream, (deviation * scale + shift).to(x.dtype.element_ty), ACTIVATION)
    tl.store(at(out, row, c, C), scale * (upstream.to(tl.float32) - along - deviation * slope), mask=inside)


@torch.library.custom_op(
    "spark_fast::batch_norm_statistics",
    mutates_args=("running_mean", "running_var", "batches"),
    schema="(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, float momentum, "
    "float eps) -> (Tensor, Tensor)",
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
    x, (mean, inverse) = _rows(x), _channels_like(x, running_mean, running_var, batches, momentum, eps)
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    tile_rows, tile, tiles, runs = _runs(rows, channels)
    partial = mean.new_empty(runs, 2, channels)
    tracked = running_mean is not None
    with on_device(x):
        _statistics_kernel[(runs * -(-channels // tile),)](
            x, partial, rows, tiles, channels, tile_rows, tile, num_warps=WARPS
        )
        _merge_kernel[(-(-channels // MERGED),)](
            x, partial, mean, inverse, *((running_mean, running_var, batches) if tracked else (mean,) * 3), rows, runs,
            tiles * tile_rows, momentum, eps, channels, tracked, 64, MERGED, num_warps=WARPS,
        )  # fmt: skip
    return mean, inverse


@torch.library.custom_op(
    "spark_fast::batch_norm_apply",
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, Tensor mean, Tensor inverse, Tensor? weight, Tensor? bias, str activation) "
    "-> Tensor",
)
def batch_norm_apply(
    x: Tensor, residual: Tensor | None, mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None,
    activation: str,
) -> Tensor:  # fmt: skip
    """activation((x - mean) * inverse * weight + bias + residual); its gradient counts that the statistics are x's.

    Args:
        x, residual: (N, C, H, W), of one dtype, in which the output is rounded once.
        mean, inverse: what `batch_norm_statistics` gives for this x.
        weight, bias: (C,), or neither.
        activation: "relu", "relu6", or "": none.
    """
    x, out = _rows(x), _map_like(x)
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    tile_rows, tile, programs = _tiles(rows, channels)
    with on_device(x):
        _apply_kernel[(programs,)](
            x, x if residual is None else _rows(residual), *_affine(mean, inverse, weight, bias), out, rows, channels,
            weight is not None, residual is not None, activation, tile_rows, tile, num_warps=WARPS,
        )  # fmt: skip
    return out


@torch.library.custom_op(
    "spark_fast::batch_norm_sums",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor? y, Tensor mean, Tensor inverse, Tensor? weight, Tensor? bias, "
    "str activation) -> (Tensor, Tensor)",
)
def batch_norm_sums(
    grad: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, inverse: Tensor, weight: Tensor | None,
    bias: Tensor | None, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of bias and weight, (2, C) fp32, and the gradient before the activation.

    Args:
        y: the output, where there was a residual; None: what passed the activation is computed again from x, and the
            gradient before it is not written: the second is empty.
    """
    grad, x = _rows(grad), _rows(x)
    passed = _map_like(x) if y is not None else x.new_empty(0)
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    tile_rows, tile, tiles, runs = _runs(rows, channels)
    partial = mean.new_empty(runs, 2, channels)
    with on_device(x):
        _sums_kernel[(runs * -(-channels // tile),)](
            grad, x, x if y is None else _rows(y), *_affine(mean, inverse, weight, bias), passed, partial, rows, tiles,
            channels, weight is not None, y is not None, activation, tile_rows, tile, num_warps=WARPS,
        )  # fmt: skip
    return partial.sum(0), passed


@torch.library.custom_op(
    "spark_fast::batch_norm_input_gradient",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor mean, Tensor inverse, Tensor? weight, Tensor? bias, Tensor sums, "
    "str activation) -> Tensor",
)
def batch_norm_input_gradient(
    grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None, sums: Tensor,
    activation: str,
) -> Tensor:  # fmt: skip
    """The gradient of `batch_norm_apply` with respect to x, `sums` being what `batch_norm_sums` gives.

    Args:
        activation: "" if `grad` is the gradient before the activation already.
    """
    grad, x, out = _rows(grad), _rows(x), _map_like(x)
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    tile_rows, tile, programs = _tiles(rows, channels)
    with on_device(x):
        _input_gradient_kernel[(programs,)](
            grad, x, *_affine(mean, inverse, weight, bias), sums, out, rows, channels, weight is not None, activation,
            tile_rows, tile, num_warps=WARPS,
        )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    """The map in channels_last, its rows few enough to be numbered."""
    rows_of(x[:, 0].unsqueeze(-1))
    return x.contiguous(memory_format=torch.channels_last)


def _affine(mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
    """The arguments of the kernels; without weight and bias something that is not read."""
    return mean, inverse, mean if weight is None else weight, mean if bias is None else bias


def _tiles(rows: int, channels: int) -> tuple[int, int, int]:
    """Rows and channels of a tile, and how many there are."""
    tile = channel_tile(channels)
    tile_rows = TILE // tile
    return tile_rows, tile, -(-rows // tile_rows) * -(-channels // tile)


def _runs(rows: int, channels: int) -> tuple[int, int, int, int]:
    """Rows and channels of a tile, tiles of a run, and runs: none is empty."""
    tile_rows, tile, _ = _tiles(rows, channels)
    all_tiles = -(-rows // tile_rows)
    tiles = -(-all_tiles // min(all_tiles, max(1, WAVES // -(-channels // tile))))
    return tile_rows, tile, tiles, -(-all_tiles // tiles)


@batch_norm_statistics.register_fake
def _channels_like(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None, momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape[1], dtype=torch.float32), x.new_empty(x.shape[1], dtype=torch.float32)


def _map_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


batch_norm_apply.register_fake(lambda x, *rest: _map_like(x))
batch_norm_input_gradient.register_fake(lambda grad, x, *rest: _map_like(x))


@batch_norm_sums.register_fake
def _sums_like(grad: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return mean.new_empty(2, x.shape[1]), _map_like(x) if y is not None else x.new_empty(0)


class _Context(AutogradContext, Protocol):
    activation: str
    residual: bool


def _keep(ctx: _Context, inputs: tuple, output: Tensor) -> None:
    x, residual, mean, inverse, weight, bias, ctx.activation = inputs
    ctx.residual = residual is not None
    y = output if ctx.residual and ctx.activation else None
    ctx.save_for_backward(x, mean, inverse, weight, bias, y)


def _gradients(ctx: _Context, grad: Tensor) -> tuple:
    x, mean, inverse, weight, bias, y = ctx.saved_tensors
    sums, passed = batch_norm_sums(grad, x, y, mean, inverse, weight, bias, ctx.activation)
    through, activation = (grad, ctx.activation) if y is None else (passed, "")
    grad_x = batch_norm_input_gradient(through, x, mean, inverse, weight, bias, sums, activation)
    of_weight = None if weight is None else sums[1].to(weight.dtype)
    of_bias = None if bias is None else sums[0].to(bias.dtype)
    return grad_x, through if ctx.residual else None, None, None, of_weight, of_bias, None


batch_norm_apply.register_autograd(_gradients, setup_context=_keep)
