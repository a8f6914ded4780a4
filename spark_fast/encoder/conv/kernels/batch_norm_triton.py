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

The number of channels is no constant of the compiled code, only how many are read as one vector (UNIT): a network has
norms of a dozen widths, and each kernel is compiled for two or three sizes of tiles instead.

Worked example: the widest maps of ResNet-50, 224 px, batch 256, mask 0.6 (n = 5120*64, C = 256, bf16: 168 MB), norm,
shortcut and ReLU: 4 and 7 times the map instead of 8 and 8, 0.55 ms instead of 0.80 at the 3.35 TB/s of an H100.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _my_tile(C, CHANNELS: tl.constexpr):
    """As `tile.my_tile`, for any C: kernels are compiled once for all of them."""
    channel_tiles = (C + CHANNELS - 1) // CHANNELS
    pid = tl.program_id(0)
    return pid // channel_tiles, pid % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)


@triton.jit
def _at(first, row, c, C):
    """As `tile.at`."""
    return first + row.to(tl.int64)[:, None] * C + c[None, :]


@triton.jit
def statistics_kernel(
    x, partial, N, RUN, GROUPS, UNIT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Mean, counted from the first row of all, and squared deviations of CHANNELS over RUN tiles of ROWS rows.

    That row is near the mean where the mean is far from 0, so that no digits are lost.
    """
    C = GROUPS * UNIT
    run, c = _my_tile(C, CHANNELS)
    in_c = c < C
    first = run * RUN * ROWS + tl.arange(0, ROWS)
    base = tl.load(x + c, mask=in_c, other=0.0).to(tl.float32)
    mean = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for tile in range(RUN):
        row = first + tile * ROWS
        inside = (row < N)[:, None] & in_c[None, :]
        value = tl.load(_at(x, row, c, C), mask=inside, other=0.0).to(tl.float32) - base[None, :]
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
def merge_kernel(
    x, partial, mean, inverse, running_mean, running_var, batches, N, RUNS, RUN_ROWS, momentum, eps,
    GROUPS, UNIT: tl.constexpr, OF_RUNS: tl.constexpr, FINAL: tl.constexpr, TRACKED: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(var + eps) of all rows, from those of RUNS runs; the running statistics, in place.

    Of all ranks they are merged twice: from the runs of each to its mean and squared deviations, which are not FINAL
    and take the place of `inverse`; then those of the ranks, whose means are not counted from the first row (OF_RUNS).
    """
    C = GROUPS * UNIT
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    in_c = c < C
    total = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, RUNS, ROWS):
        run = first + tl.arange(0, ROWS)
        rows = tl.minimum(tl.maximum(N - run * RUN_ROWS, 0), RUN_ROWS).to(tl.float32)[:, None]
        means = tl.load(_at(partial, run, c, 2 * C), mask=(run < RUNS)[:, None] & in_c[None, :], other=0.0)
        total += tl.sum(rows * means, 0)
    centre = total / N
    squares = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, RUNS, ROWS):
        run = first + tl.arange(0, ROWS)
        rows = tl.minimum(tl.maximum(N - run * RUN_ROWS, 0), RUN_ROWS).to(tl.float32)[:, None]
        inside = (run < RUNS)[:, None] & in_c[None, :]
        between = tl.load(_at(partial, run, c, 2 * C), mask=inside, other=0.0) - centre[None, :]
        within = tl.load(_at(partial + C, run, c, 2 * C), mask=inside, other=0.0)
        squares += tl.sum(within + rows * between * between, 0)
    if OF_RUNS:
        centre += tl.load(x + c, mask=in_c, other=0.0).to(tl.float32)
    tl.store(mean + c, centre, mask=in_c)
    tl.store(inverse + c, 1.0 / tl.sqrt(squares / N + eps) if FINAL else squares, mask=in_c)
    if TRACKED:
        old = tl.load(running_mean + c, mask=in_c, other=0.0).to(tl.float32)
        tl.store(running_mean + c, momentum * centre + (1 - momentum) * old, mask=in_c)
        old = tl.load(running_var + c, mask=in_c, other=0.0).to(tl.float32)
        tl.store(running_var + c, momentum * (squares / (N - 1)) + (1 - momentum) * old, mask=in_c)
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + 1)


@triton.jit
def _of_channels(mean, inverse, weight, bias, c, C, AFFINE: tl.constexpr):
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
def apply_kernel(
    x, residual, mean, inverse, weight, bias, out, N, GROUPS, UNIT: tl.constexpr, AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of the output."""
    C = GROUPS * UNIT
    tile, c = _my_tile(C, CHANNELS)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = (row < N)[:, None] & (c < C)[None, :]
    centre, _, scale, shift = _of_channels(mean, inverse, weight, bias, c, C, AFFINE)
    z = (tl.load(_at(x, row, c, C), mask=inside, other=0.0).to(tl.float32) - centre) * scale + shift
    if RESIDUAL:
        z += tl.load(_at(residual, row, c, C), mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        z = tl.where(z <= 0.0, 0.0, z)  # by comparisons, so that NaN stays NaN
    if ACTIVATION == "relu6":
        z = tl.where(z >= 6.0, 6.0, z)
    tl.store(_at(out, row, c, C), z, mask=inside)


@triton.jit
def _let_through(grad, z, ACTIVATION: tl.constexpr):
    """The gradient behind the activation, from its input or its output: 0 at its limits and beyond."""
    if ACTIVATION != "":
        grad = tl.where(z <= 0.0, 0.0, grad)
    if ACTIVATION == "relu6":
        grad = tl.where(z >= 6.0, 0.0, grad)
    return grad


@triton.jit
def sums_kernel(
    grad, x, y, mean, inverse, weight, bias, passed, partial, N, RUN, GROUPS, UNIT: tl.constexpr, AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradients of bias and weight over RUN tiles of ROWS rows; with RESIDUAL, the gradient that passes is kept."""
    C = GROUPS * UNIT
    run, c = _my_tile(C, CHANNELS)
    in_c = c < C
    centre, std, scale, shift = _of_channels(mean, inverse, weight, bias, c, C, AFFINE)
    of_bias = tl.zeros((ROWS, CHANNELS), tl.float32)
    of_weight = tl.zeros((ROWS, CHANNELS), tl.float32)
    for tile in range(RUN):
        row = (run * RUN + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < N)[:, None] & in_c[None, :]
        upstream = tl.load(_at(grad, row, c, C), mask=inside, other=0.0)
        deviation = tl.load(_at(x, row, c, C), mask=inside, other=0.0).to(tl.float32) - centre
        if RESIDUAL:
            upstream = _let_through(upstream, tl.load(_at(y, row, c, C), mask=inside, other=0.0), ACTIVATION)
            tl.store(_at(passed, row, c, C), upstream, mask=inside)
        else:
            upstream = _let_through(upstream, (deviation * scale + shift).to(x.dtype.element_ty), ACTIVATION)
        of_bias += upstream.to(tl.float32)
        of_weight += upstream.to(tl.float32) * deviation
    place = partial + run * (2 * C) + c
    tl.store(place, tl.sum(of_bias, 0), mask=in_c)
    tl.store(place + C, tl.sum(of_weight * std, 0), mask=in_c)


@triton.jit
def input_gradient_kernel(
    grad, x, mean, inverse, weight, bias, sums, out, N, GROUPS, UNIT: tl.constexpr, AFFINE: tl.constexpr,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of the input's gradient: scale * (grad - its mean - normalised x * the mean of grad * normalised x)."""
    C = GROUPS * UNIT
    tile, c = _my_tile(C, CHANNELS)
    row, in_c = tile * ROWS + tl.arange(0, ROWS), c < C
    inside = (row < N)[:, None] & in_c[None, :]
    centre, std, scale, shift = _of_channels(mean, inverse, weight, bias, c, C, AFFINE)
    along = tl.load(sums + c, mask=in_c, other=0.0)[None, :] / N
    slope = std * tl.load(sums + C + c, mask=in_c, other=0.0)[None, :] / N
    upstream = tl.load(_at(grad, row, c, C), mask=inside, other=0.0)
    deviation = tl.load(_at(x, row, c, C), mask=inside, other=0.0).to(tl.float32) - centre
    upstream = _let_through(upstream, (deviation * scale + shift).to(x.dtype.element_ty), ACTIVATION)
    tl.store(_at(out, row, c, C), scale * (upstream.to(tl.float32) - along - deviation * slope), mask=inside)
