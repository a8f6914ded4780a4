"""Depthwise convolution of packed patches that reads the neighbours where they lie: no window, no dense map.

    out[v, y, x, c] = bias[c] + sum over taps (i, j) of weight[c, i, j] * cell(v, y*s + i*d - lo, x*s + j*d - lo)[c]

where a coordinate outside patch v's own b cells is a cell of a neighbour, found in a (V, 2R+1, 2R+1) table that
reaches R = ceil(max(lo, hi) / b) patches: 1 for a 7x7 at b = 8 and 4, 2 at b = 2, 3 at b = 1. A missing patch is zero
and is not read. The gradient of the input is the same kernel with its taps turned round: a cell's coordinate among the
outputs is (y + i*d - lo') / s, lo' = d*(k-1) - lo, for the taps that divide. The gradient of the weight sums products
over all cells, in fp32, in two fixed steps (each program a run of cells, then over programs): no atomics, the same bits
every time; that of the bias is one more tap, which reads ones.

For stride 1 (e bytes per element, u <= 1 the share of taps that fall on a visible cell):

    forward, input gradient   bytes = 2*e*V*b^2*C    FLOPs = 2*k^2*V*b^2*C    read from L1: u*e*k^2*V*b^2*C
    weight gradient           bytes = 2*e*V*b^2*C    FLOPs = 2*k^2*V*b^2*C    read from L2: ceil((k^2+1)/8) * bytes

Worked example: ConvNeXt-S, 7x7, 224 px, batch 128, mask 0.6 (V = 128*20 = 2560), bf16. Stages 1-4 have b = 8, 4, 2, 1
and C = 96, 192, 384, 768: 15.7, 7.9, 3.9 and 2.0 M elements. Stage 1: 63 MB (19 us at the 3.35 TB/s of an H100) and
1.54 GFLOP (23 us at its 67 TFLOP/s in fp32), forward and each gradient, so arithmetic and instructions bound it, not
memory; the window tensor that it does not write would have 14^2/8^2 = 3.1 times the cells. On the dense map all 49
patches are computed instead of 20, and laid out and collected besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from spark_fast.autograd import AutogradContext
from spark_fast.encoder.conv.geometry import Axis
from spark_fast.encoder.conv.kernels.tile import (
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

TAPS = 8  # of the weight, per program of its gradient
CELLS = 32  # that such a program multiplies at a time


@triton.jit
def _convolve_kernel(
    cells, taps, bias, neighbours, out, V,
    C: tl.constexpr, B: tl.constexpr, B_OUT: tl.constexpr, K_Y: tl.constexpr, K_X: tl.constexpr,
    LO_Y: tl.constexpr, LO_X: tl.constexpr, D_Y: tl.constexpr, D_X: tl.constexpr, UP: tl.constexpr,
    DOWN: tl.constexpr, REACH: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of outputs: output y sees, by tap i, the cell (y*UP + i*D - LO) / DOWN."""
    tile, c = my_tile(C, CHANNELS)
    cell = tile * ROWS + tl.arange(0, ROWS)  # row of `out`
    v = cell // (B_OUT * B_OUT)
    first_y = cell // B_OUT % B_OUT * UP - LO_Y + REACH * B * DOWN
    first_x = cell % B_OUT * UP - LO_X + REACH * B * DOWN
    inside, in_c = v < V, c < C
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for i in range(K_Y):
        for j in tl.static_range(K_X):
            row, there = source(neighbours, v, first_y + i * D_Y, first_x + j * D_X, inside, V, B, DOWN, REACH)
            mask = there[:, None] & in_c[None, :]
            values = tl.load(at(cells, row, c, C), mask=mask, other=0.0)
            tap = tl.load(taps + (i * K_X + j) * C + c, mask=in_c, other=0.0)
            total += values.to(tl.float32) * tap.to(tl.float32)[None, :]
    if BIAS:
        total += tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    tl.store(at(out, cell, c, C), total, mask=inside[:, None] & in_c[None, :])


@triton.jit
def _weight_gradient_kernel(
    grad, cells, neighbours, partial, V,
    C: tl.constexpr, B: tl.constexpr, B_OUT: tl.constexpr, K_Y: tl.constexpr, K_X: tl.constexpr,
    LO_Y: tl.constexpr, LO_X: tl.constexpr, D_Y: tl.constexpr, D_X: tl.constexpr, STRIDE: tl.constexpr,
    REACH: tl.constexpr, RUN: tl.constexpr, TAPS: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """TAPS of the weight by CHANNELS, over a run of RUN tiles of outputs; tap K_Y*K_X is the bias."""
    tap_tiles: tl.constexpr = K_Y * K_X // TAPS + 1
    part, c = my_tile(C, CHANNELS)
    tap = part % tap_tiles * TAPS + tl.arange(0, TAPS)
    run = part // tap_tiles
    down, along = tap // K_X * D_Y - LO_Y + REACH * B, tap % K_X * D_X - LO_X + REACH * B
    in_c = c < C
    total = tl.zeros((TAPS, CELLS, CHANNELS), tl.float32)
    for tile in range(RUN):
        cell = (run * RUN + tile) * CELLS + tl.arange(0, CELLS)
        v, y, x = cell // (B_OUT * B_OUT), cell // B_OUT % B_OUT * STRIDE, cell % B_OUT * STRIDE
        at_y, at_x = y[None, :] + down[:, None], x[None, :] + along[:, None]
        wanted = (v < V)[None, :] & (tap < K_Y * K_X)[:, None]
        row, there = source(neighbours, v[None, :], at_y, at_x, wanted, V, B, 1, REACH)
        mask = there[:, :, None] & in_c[None, None, :]
        values = tl.load(cells + row.to(tl.int64)[:, :, None] * C + c[None, None, :], mask=mask, other=0.0)
        values = tl.where((tap == K_Y * K_X)[:, None, None], 1.0, values.to(tl.float32))
        mask = (v < V)[:, None] & in_c[None, :]
        outer = tl.load(at(grad, cell, c, C), mask=mask, other=0.0).to(tl.float32)
        total += values * outer[None, :, :]
    place = run * (K_Y * K_X + 1) + tap
    tl.store(at(partial, place, c, C), tl.sum(total, 1), mask=(tap <= K_Y * K_X)[:, None] & in_c[None, :])


@torch.library.custom_op(
    "spark_fast::depthwise_convolution",
    mutates_args=(),
    schema="(Tensor cells, Tensor weight, Tensor? bias, Tensor neighbours, int[] y, int[] x) -> Tensor",
)
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
    out = _outputs_like(cells, weight, bias, neighbours, y, x)
    axes = Axis(*y), Axis(*x)
    taps = weight.flatten(1).t().contiguous()  # (ky*kx, C): channels next to one another, as in the cells
    _convolve(cells, taps, bias, neighbours, out, axes, (axes[0].lo, axes[1].lo), (axes[0].stride, 1))
    return out


@torch.library.custom_op(
    "spark_fast::depthwise_input_gradient",
    mutates_args=(),
    schema="(Tensor grad, Tensor weight, Tensor neighbours, int[] y, int[] x) -> Tensor",
)
def input_gradient(grad: Tensor, weight: Tensor, neighbours: Tensor, y: Sequence[int], x: Sequence[int]) -> Tensor:
    """The gradient of `depthwise_convolution` with respect to its cells: (V, b/stride, b/stride, C) -> (V, b, b, C)."""
    out = _cells_like(grad, weight, neighbours, y, x)
    axes = Axis(*y), Axis(*x)
    taps = weight.flatten(1).flip(1).t().contiguous()
    lo = (axes[0].reach - 1 - axes[0].lo, axes[1].reach - 1 - axes[1].lo)
    _convolve(grad, taps, None, neighbours, out, axes, lo, (1, axes[0].stride))
    return out


@torch.library.custom_op(
    "spark_fast::depthwise_weight_gradient",
    mutates_args=(),
    schema="(Tensor grad, Tensor cells, Tensor neighbours, int[] y, int[] x) -> (Tensor, Tensor)",
)
def weight_gradient(
    grad: Tensor, cells: Tensor, neighbours: Tensor, y: Sequence[int], x: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The gradients of `depthwise_convolution` with respect to its weight (C, 1, ky, kx) and bias (C,), fp32."""
    axes = Axis(*y), Axis(*x)
    (count, b, _, channels), rows = cells.shape, grad.shape[:-1].numel()
    reach = reach_of(neighbours, axes, b)
    rows_of(grad, cells, neighbours[..., None])
    size = axes[0].kernel * axes[1].kernel
    tile = channel_tile(channels, 32)
    programs = -(-channels // tile) * (size // TAPS + 1)
    all_tiles = -(-rows // CELLS)
    tiles = max(1, -(-all_tiles // max(1, 4 * WAVES // programs)))  # per run of cells
    runs = -(-all_tiles // tiles)
    partial = cells.new_empty(runs, size + 1, channels, dtype=torch.float32)
    if runs:
        with on_device(cells):
            _weight_gradient_kernel[(runs * programs,)](
                grad.contiguous(), cells.contiguous(), neighbours.contiguous(), partial, count,
                channels, b, grad.shape[1], axes[0].kernel, axes[1].kernel, axes[0].lo, axes[1].lo,
                axes[0].dilation, axes[1].dilation, axes[0].stride, reach, tiles, TAPS, CELLS, tile, num_warps=4,
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
    tile = channel_tile(channels, 64)
    channel_tiles = -(-channels // tile)
    rows = row_tile(out.shape[:-1].numel(), channel_tiles, most=64)
    programs = -(-out.shape[:-1].numel() // rows) * channel_tiles
    if programs:
        with on_device(out):
            _convolve_kernel[(programs,)](
                cells.contiguous(), taps, taps if bias is None else bias.contiguous(), neighbours.contiguous(), out,
                len(cells), channels, b, out.shape[1], y.kernel, x.kernel, *lo, y.dilation, x.dilation, *steps, reach,
                bias is not None, rows, tile, num_warps=4,
            )  # fmt: skip


@depthwise_convolution.register_fake
def _outputs_like(
    cells: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, y: Sequence[int], x: Sequence[int]
) -> Tensor:
    b = cells.shape[1] // Axis(*y).stride
    return cells.new_empty(cells.shape[0], b, b, cells.shape[3])


@input_gradient.register_fake
def _cells_like(grad: Tensor, weight: Tensor, neighbours: Tensor, y: Sequence[int], x: Sequence[int]) -> Tensor:
    b = grad.shape[1] * Axis(*y).stride
    return grad.new_empty(grad.shape[0], b, b, grad.shape[3])


@weight_gradient.register_fake
def _weights_like(
    grad: Tensor, cells: Tensor, neighbours: Tensor, y: Sequence[int], x: Sequence[int]
) -> tuple[Tensor, Tensor]:
    channels = cells.shape[3]
    kernel = cells.new_empty(channels, 1, Axis(*y).kernel, Axis(*x).kernel, dtype=torch.float32)
    return kernel, cells.new_empty(channels, dtype=torch.float32)


class _DepthwiseContext(AutogradContext, Protocol):
    y: Sequence[int]
    x: Sequence[int]
    bias: torch.dtype | None


def _keep(ctx: _DepthwiseContext, inputs: tuple, output: Tensor) -> None:
    cells, weight, bias, neighbours, ctx.y, ctx.x = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(cells, weight, neighbours)


def _gradients(ctx: _DepthwiseContext, grad: Tensor) -> tuple:
    cells, weight, neighbours = ctx.saved_tensors
    grad_cells = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_cells = input_gradient(grad, weight, neighbours, ctx.y, ctx.x)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_weight, grad_bias = weight_gradient(grad, cells, neighbours, ctx.y, ctx.x)
        grad_weight, grad_bias = grad_weight.to(weight.dtype), None if ctx.bias is None else grad_bias.to(ctx.bias)
    return grad_cells, grad_weight, grad_bias, None, None, None


depthwise_convolution.register_autograd(_gradients, setup_context=_keep)
