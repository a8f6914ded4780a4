"""Depthwise convolution of packed patches that reads the neighbours where they lie: no window, no dense map.

    out[v, y, x, c] = bias[c] + sum over taps (i, j) of weight[c, i, j] * cell(v, y*s + i*d - lo, x*s + j*d - lo)[c]

where a coordinate outside patch v's own b cells is a cell of a neighbour, found in a (V, 2R+1, 2R+1) table that
reaches R = ceil(max(lo, hi) / b) patches: 1 for a 7x7 at b = 8 and 4, 2 at b = 2, 3 at b = 1. A missing patch is zero
and is not read. The gradient of the input is the same kernel with its taps turned round: a cell's coordinate among the
outputs is (y + i*d - lo') / s, lo' = d*(k-1) - lo, for the taps that divide.

Instructions bound these kernels, so a thread computes up to 8 outputs side by side: per row of taps it reads each of
the 7 + k cells that they see once, converts it once, and multiplies it with all taps from registers. If a patch is no
wider, which neighbour has a cell of the row, and where in it, is known when the kernel is compiled.

The gradient of the weight sums products over all cells, in fp32, in two fixed steps (each program a run of cells, then
over runs): no atomics, the same bits every time.

For stride 1 (e bytes per element, n cells side by side, so n = b up to 8):

    forward, input gradient   bytes = 2*e*V*b^2*C    FLOPs = 2*k^2*V*b^2*C    read from L1: e*k*(1 + (k-1)/n)*V*b^2*C
    weight gradient           bytes = 2*e*V*b^2*C    FLOPs = 2*k^2*V*b^2*C    read from L1: e*k*(2 + (k-1)/n)*V*b^2*C

and for the weight 8*runs*(k^2+1)*C bytes of sums, a run being 64 KB of cells and gradients at most.

Worked example: ConvNeXt-S, 7x7, 224 px, batch 128, mask 0.6 (V = 128*20 = 2560), bf16. Stages 1-4 have b = 8, 4, 2, 1
and C = 96, 192, 384, 768: 15.7, 7.9, 3.9 and 2.0 M elements. Stage 1: 63 MB (19 us at the 3.35 TB/s of an H100) and
1.54 GFLOP (23 us at its 67 TFLOP/s in fp32), forward and each gradient; at the 1.8 instructions a multiply-add of the
compiled kernel (docs/explanation/gpu.md) 46 us. The window tensor that it does not write would have 14^2/8^2 = 3.1
times the cells. On the dense map all 49 patches are computed instead of 20, and laid out and collected besides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from spark_fast.encoder.conv.geometry import Axis
from spark_fast.encoder.conv.kernels.neighbour_operator import neighbour_operator, outputs_like
from spark_fast.encoder.conv.kernels.operator import operator
from spark_fast.encoder.conv.kernels.tile import (
    PROCESSORS,
    WAVES,
    at,
    channel_tile,
    my_tile,
    on_device,
    reach_of,
    row_tile,
    rows_of,
    source,
)

WARPS = 4
RUN_BYTES = 2**16  # of cells and gradients that a program of the weight's gradient goes over: a part of L1, 2^18


@triton.jit
def _patch_row(
    neighbours, v, at_y, wanted, V, COLUMN: tl.constexpr, B: tl.constexpr, DOWN: tl.constexpr, REACH: tl.constexpr
):  # fmt: skip
    """The first cell of a row of cells, at_y / DOWN down from the first neighbour, in a COLUMN of patches around v."""
    side: tl.constexpr = 2 * REACH + 1
    y = at_y // DOWN
    if DOWN > 1:
        wanted = wanted & (y * DOWN == at_y)
    patch = tl.load(neighbours + (v * side + y // B) * side + COLUMN, mask=wanted, other=V).to(tl.int32)
    return patch * (B * B) + y % B * B, patch < V


@triton.jit
def _add_where_seen(totals, values, factors, AT: tl.constexpr, UP: tl.constexpr, D: tl.constexpr):
    """Add values * factors[j] to totals[x] wherever x*UP + j*D is AT."""
    for x in tl.static_range(len(totals)):
        if ((AT - x * UP) % D == 0) & (x * UP <= AT) & (AT - x * UP < len(factors) * D):
            total = totals[x] + values * factors[(AT - x * UP) // D]
            totals = _append(totals[:x], total) + totals[x + 1 :]
    return totals


@triton.jit
def _append(items, item):
    return items + (item,)  # noqa: RUF005 (Triton has no unpacking)


@triton.jit
def _add_row(
    totals, factors, cells, neighbours, v, at_y, at_x, c, inside, V, C: tl.constexpr, B: tl.constexpr,
    DOWN: tl.constexpr, REACH: tl.constexpr, UP: tl.constexpr, D: tl.constexpr, LO: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add factors[j] times the cell at_x + x*UP + j*D - LO of a row of cells to totals[x], for all x and j.

    If WHOLE, at_x is 0 everywhere, and which patch has a cell is known beforehand.
    """
    in_c = (c < C)[None, :]
    if WHOLE:
        for column in tl.static_range(2 * REACH + 1):
            row, there = _patch_row(neighbours, v, at_y, inside, V, column, B, DOWN, REACH)
            first = at(cells, row, c, C)
            for x in tl.static_range(B):  # a cell that nothing sees is not read
                values = tl.load(first + x * C, mask=there[:, None] & in_c, other=0.0).to(tl.float32)
                totals = _add_where_seen(totals, values, factors, ((column - REACH) * B + x) * DOWN + LO, UP, D)
    else:
        for x in tl.static_range((len(totals) - 1) * UP + (len(factors) - 1) * D + 1):
            row, there = source(neighbours, v, at_y, at_x + (x - LO + REACH * B * DOWN), inside, V, B, DOWN, REACH)
            values = tl.load(at(cells, row, c, C), mask=there[:, None] & in_c, other=0.0).to(tl.float32)
            totals = _add_where_seen(totals, values, factors, x, UP, D)
    return totals


@triton.jit
def _convolve_kernel(
    cells, taps, bias, neighbours, out, V,
    C: tl.constexpr, B: tl.constexpr, B_OUT: tl.constexpr, K_Y: tl.constexpr, K_X: tl.constexpr,
    LO_Y: tl.constexpr, LO_X: tl.constexpr, D_Y: tl.constexpr, D_X: tl.constexpr, UP: tl.constexpr,
    DOWN: tl.constexpr, REACH: tl.constexpr, BIAS: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """ROWS times SPAN outputs side by side: output y sees, by tap i, the cell (y*UP + i*D - LO) / DOWN."""
    parts: tl.constexpr = B_OUT // SPAN
    tile, c = my_tile(C, CHANNELS)
    line = tile * ROWS + tl.arange(0, ROWS)
    v, at_x = line // (B_OUT * parts), line % parts * (SPAN * UP)
    at_y = line // parts % B_OUT * UP - LO_Y + REACH * B * DOWN
    inside, in_c = v < V, c < C
    start = tl.zeros((ROWS, CHANNELS), tl.float32)
    if BIAS:
        start += tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    totals = (start,) * SPAN
    for i in range(K_Y):
        factors = totals[:0]
        for j in tl.static_range(K_X):
            tap = tl.load(taps + (i * K_X + j) * C + c, mask=in_c, other=0.0)
            factors = _append(factors, tap.to(tl.float32)[None, :])
        totals = _add_row(
            totals, factors, cells, neighbours, v, at_y + i * D_Y, at_x, c, inside, V, C, B, DOWN, REACH, UP, D_X, LO_X,
            parts == 1,
        )  # fmt: skip
    first = at(out, line * SPAN, c, C)
    for x in tl.static_range(SPAN):
        tl.store(first + x * C, totals[x], mask=inside[:, None] & in_c[None, :])


@triton.jit
def _weight_gradient_kernel(
    grad, cells, neighbours, partial, V, RUN,
    C: tl.constexpr, B: tl.constexpr, B_OUT: tl.constexpr, K_Y: tl.constexpr, K_X: tl.constexpr,
    LO_Y: tl.constexpr, LO_X: tl.constexpr, D_Y: tl.constexpr, D_X: tl.constexpr, STRIDE: tl.constexpr,
    REACH: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The weight's taps by CHANNELS, row by row, over RUN tiles of ROWS times SPAN outputs; row 0 sums the bias too.

    A run is small enough that it comes from L1 for all rows of taps but the first.
    """
    parts: tl.constexpr = B_OUT // SPAN
    run, c = my_tile(C, CHANNELS)
    in_c = c < C
    place = run * ((K_Y * K_X + 1) * C) + c
    for i in range(K_Y):
        bias = tl.zeros((ROWS, CHANNELS), tl.float32)
        totals = (bias,) * K_X
        for tile in range(RUN):
            line = (run * RUN + tile) * ROWS + tl.arange(0, ROWS)
            v, at_x = line // (B_OUT * parts), line % parts * (SPAN * STRIDE)
            at_y = line // parts % B_OUT * STRIDE + i * D_Y - LO_Y + REACH * B
            inside = v < V
            first = at(grad, line * SPAN, c, C)
            outer = totals[:0]
            for x in tl.static_range(SPAN):
                values = tl.load(first + x * C, mask=inside[:, None] & in_c[None, :], other=0.0)
                outer = _append(outer, values.to(tl.float32))
            if i == 0:
                for x in tl.static_range(SPAN):
                    bias += outer[x]
            totals = _add_row(
                totals, outer, cells, neighbours, v, at_y, at_x, c, inside, V, C, B, 1, REACH, D_X, STRIDE, LO_X,
                parts == 1,
            )  # fmt: skip
        for j in tl.static_range(K_X):
            tl.store(partial + place + (i * K_X + j) * C, tl.sum(totals[j], 0), mask=in_c)
        if i == 0:
            tl.store(partial + place + K_Y * K_X * C, tl.sum(bias, 0), mask=in_c)


@operator("(Tensor cells, Tensor weight, Tensor? bias, Tensor neighbours, int[] y, int[] x) -> Tensor")
def depthwise_convolution(
    cells: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, y: Sequence[int], x: Sequence[int]
) -> Tensor:
    """Convolve each channel with its own kernel.

    Args:
        cells: (V, b, b, C), fp32, bf16 or fp16; sums are fp32.
        weight: (C, 1, ky, kx).
        bias: (C,) or None.
        neighbours: (V, 2R+1, 2R+1) int32, the patch in each direction, V where there is none
            (`VisiblePatches.neighbourhood`), R patches as far as the layer looks.
        y, x: the fields of `Axis`.

    Returns:
        (V, b/stride, b/stride, C).

    Raises:
        ValueError: a layer that looks beyond the table, or too many rows.
    """
    out = outputs_like(cells, weight, bias, neighbours, y, x)
    axes = Axis(*y), Axis(*x)
    taps = weight.flatten(1).t().contiguous()  # (ky*kx, C): channels next to one another, as in the cells
    _convolve(cells, taps, bias, neighbours, out, axes, (axes[0].lo, axes[1].lo), (axes[0].stride, 1))
    return out


@operator("(Tensor grad, Tensor weight, Tensor neighbours, int[] y, int[] x) -> Tensor")
def depthwise_input_gradient(
    grad: Tensor, weight: Tensor, neighbours: Tensor, y: Sequence[int], x: Sequence[int]
) -> Tensor:
    """The gradient of `depthwise_convolution` with respect to its cells: (V, b/stride, b/stride, C) -> (V, b, b, C)."""
    out = _cells_like(grad, weight, neighbours, y, x)
    axes = Axis(*y), Axis(*x)
    taps = weight.flatten(1).flip(1).t().contiguous()
    lo = (axes[0].reach - 1 - axes[0].lo, axes[1].reach - 1 - axes[1].lo)
    _convolve(grad, taps, None, neighbours, out, axes, lo, (1, axes[0].stride))
    return out


@operator("(Tensor grad, Tensor cells, Tensor neighbours, int[] y, int[] x) -> (Tensor, Tensor)")
def depthwise_weight_gradient(
    grad: Tensor, cells: Tensor, neighbours: Tensor, y: Sequence[int], x: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The gradients of `depthwise_convolution` with respect to its weight (C, 1, ky, kx) and bias (C,), fp32."""
    axes = Axis(*y), Axis(*x)
    count, b, _, channels = cells.shape
    reach = reach_of(neighbours, axes, b)
    rows_of(grad, cells, neighbours[..., None])
    size = axes[0].kernel * axes[1].kernel
    span, rows, tile, all_rows = _tiles(grad, axes[1].kernel, twice=False)
    channel_tiles, all_tiles = -(-channels // tile), -(-all_rows // rows)
    fitting = RUN_BYTES // (2 * rows * span * tile * cells.element_size())
    tiles = max(1, min(fitting, -(-all_tiles // -(-WAVES // channel_tiles))))  # per run of rows
    runs = -(-all_tiles // tiles)
    partial = cells.new_empty(runs, size + 1, channels, dtype=torch.float32)
    if runs:
        with on_device(cells):
            _weight_gradient_kernel[(runs * channel_tiles,)](
                grad.contiguous(), cells.contiguous(), neighbours.contiguous(), partial, count, tiles,
                channels, b, grad.shape[1], axes[0].kernel, axes[1].kernel, axes[0].lo, axes[1].lo,
                axes[0].dilation, axes[1].dilation, axes[0].stride, reach, span, rows, tile, num_warps=WARPS,
            )  # fmt: skip
    total = partial.sum(0)
    kernel = total[:-1].t().reshape(channels, 1, axes[0].kernel, axes[1].kernel)
    return kernel.contiguous(), total[-1].clone()


def _convolve(
    cells: Tensor, taps: Tensor, bias: Tensor | None, neighbours: Tensor, out: Tensor,
    axes: tuple[Axis, Axis], lo: tuple[int, int], steps: tuple[int, int],
) -> None:  # fmt: skip
    """Launch the kernel: `lo` cells before the first, `steps` (UP, DOWN) from outputs to cells."""
    y, x = axes
    channels, b = cells.shape[3], cells.shape[1]
    reach = reach_of(neighbours, axes, max(b, out.shape[1]))
    rows_of(cells, out, neighbours[..., None])
    span, rows, tile, all_rows = _tiles(out, x.kernel, twice=True)
    programs = -(-all_rows // rows) * -(-channels // tile)
    if programs:
        with on_device(out):
            _convolve_kernel[(programs,)](
                cells.contiguous(), taps, taps if bias is None else bias.contiguous(), neighbours.contiguous(), out,
                len(cells), channels, b, out.shape[1], y.kernel, x.kernel, *lo, y.dilation, x.dilation, *steps, reach,
                bias is not None, span, rows, tile, num_warps=WARPS,
            )  # fmt: skip


def _tiles(outputs: Tensor, kernel: int, twice: bool) -> tuple[int, int, int, int]:
    """How many outputs a thread has side by side (SPAN), rows of them and channels a program has, and rows there are.

    A thread keeps SPAN + `kernel` numbers of each of 8 channels in registers, fewer channels where these are many. With
    `twice` it has two rows where that leaves programs enough: what they share is then read half as often.
    """
    b, channels = outputs.shape[2:]
    span = max(n for n in range(1, 9) if b % n == 0)
    vector = next(n for n in (8, 4, 2, 1) if n == 1 or n * (span + kernel) <= 160)
    width = channel_tile(channels, 64)
    rows, tiles = outputs.shape[:-1].numel() // span, -(-channels // width)
    least = max(1, WARPS * 32 * vector // width)
    most = 2 * least if twice and span <= 4 and vector == 8 else least
    return span, row_tile(rows, tiles, most, least, 3 * PROCESSORS), width, rows


@torch.library.register_fake(depthwise_input_gradient)
def _cells_like(grad: Tensor, weight: Tensor, neighbours: Tensor, y: Sequence[int], x: Sequence[int]) -> Tensor:
    b = grad.shape[1] * Axis(*y).stride
    return grad.new_empty(grad.shape[0], b, b, grad.shape[3])


@torch.library.register_fake(depthwise_weight_gradient)
def _weights_like(
    grad: Tensor, cells: Tensor, neighbours: Tensor, y: Sequence[int], x: Sequence[int]
) -> tuple[Tensor, Tensor]:
    channels = cells.shape[3]
    kernel = cells.new_empty(channels, 1, Axis(*y).kernel, Axis(*x).kernel, dtype=torch.float32)
    return kernel, cells.new_empty(channels, dtype=torch.float32)


depthwise_with_gradient = neighbour_operator(depthwise_convolution, depthwise_input_gradient, depthwise_weight_gradient)
