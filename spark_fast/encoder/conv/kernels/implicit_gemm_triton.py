"""Convolution of packed patches as one matrix product whose rows are read where they lie: no window in memory.

    out[v, y, x, o] = bias[o] + sum over taps (i, j) and channels c of weight[o, c, i, j] * cell(v, i, j, y, x)[c]

A program computes a tile of output cells by output channels. It walks over taps and channels; each step reads a tile of
cells, found in the table of neighbours as in `depthwise_triton`, and one of the weight, and multiplies them on the
tensor cores. Sums are fp32. The gradient of the input is the same kernel with its taps turned round. With a stride s
cells are then taken by their place in it, s^2 classes one after the other, for a class sees only the taps that divide.
The gradient of the weight is a product over cells, in two fixed steps (each program a run of cells, then over runs):
no atomics, the same bits every time.

For N = V*b^2 cells in and N/s^2 out, C channels in and O out, e bytes per element:

    forward, input gradient   bytes = e*(N*C + N/s^2*O + k^2*C*O)             FLOPs = 2*k^2*C*O*N/s^2
    weight gradient           bytes = e*(N*C + N/s^2*O) + 8*runs*k^2*C*O      FLOPs the same
    read from L2              bytes = e/2*FLOPs*(1/rows + 1/columns) of a tile: one for 85 FLOPs of 256 x 128, bf16

Worked example: a 3x3 of ResNet-50's stage 2, 224 px, batch 256, mask 0.6 (V = 5120, b = 4, C = O = 128, bf16):
N = 81,920 cells, 42 MB (11 us at 4.0 TB/s), 24 GFLOP (35 us at 700 TFLOP/s), 0.28 GB from L2 (52 us at 5.5 TB/s).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
import triton
import triton.language as tl
from torch import Tensor

from spark_fast.encoder.conv.geometry import Axis
from spark_fast.encoder.conv.kernels.neighbour_operator import neighbour_operator, outputs_like
from spark_fast.encoder.conv.kernels.operator import operator
from spark_fast.encoder.conv.kernels.tile import (
    WAVES,
    add_product,
    at,
    my_tile,
    on_device,
    product_tiles,
    reach_of,
    rows_of,
    source,
)

STAGES = 3  # tiles on their way from memory while one is multiplied


@triton.jit
def _convolve_kernel(
    cells, weight, bias, neighbours, out, V,
    C: tl.constexpr, C_OUT: tl.constexpr, B: tl.constexpr, B_OUT: tl.constexpr, K_Y: tl.constexpr,
    K_X: tl.constexpr, LO_Y: tl.constexpr, LO_X: tl.constexpr, D_Y: tl.constexpr, D_X: tl.constexpr, UP: tl.constexpr,
    DOWN: tl.constexpr, REACH: tl.constexpr, PHASES: tl.constexpr, FIRST: tl.constexpr, PER_TAP: tl.constexpr,
    PER_C: tl.constexpr, PER_OUT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of outputs: output y sees, by tap i, the cell (y*UP + i*D - LO) / DOWN.

    With PHASES > 1 (then DOWN, of dilation 1, no kernel smaller) the outputs of a tile have one remainder y % PHASES,
    and one of x.
    """
    side: tl.constexpr = B_OUT // PHASES
    steps_c: tl.constexpr = (C + DEPTH - 1) // DEPTH
    tile, o = my_tile(C_OUT, COLUMNS)
    tiles = (V * (side * side) + ROWS - 1) // ROWS  # of a class
    phase_y, phase_x = tile // tiles // PHASES, tile // tiles % PHASES
    place = tile % tiles * ROWS + tl.arange(0, ROWS)
    v = place // (side * side)
    y, x = place // side % side * PHASES + phase_y, place % side * PHASES + phase_x
    inside, in_o = v < V, o < C_OUT
    i_first, j_first = (LO_Y + PHASES - phase_y) % PHASES, (LO_X + PHASES - phase_x) % PHASES
    along = (K_X - j_first + PHASES - 1) // PHASES  # taps of this class
    steps = (K_Y - i_first + PHASES - 1) // PHASES * along * steps_c
    first_y, first_x = y * UP - LO_Y + REACH * B * DOWN, x * UP - LO_X + REACH * B * DOWN
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(steps):
        i = i_first + step // steps_c // along * PHASES
        j = j_first + step // steps_c % along * PHASES
        c = step % steps_c * DEPTH + tl.arange(0, DEPTH)
        row, there = source(neighbours, v, first_y + i * D_Y, first_x + j * D_X, inside, V, B, DOWN, REACH)
        values = tl.load(at(cells, row, c, C), mask=there[:, None] & (c < C)[None, :], other=0.0)
        taps = weight + FIRST + (i * K_X + j) * PER_TAP + c[:, None] * PER_C + o[None, :] * PER_OUT
        factors = tl.load(taps, mask=(c < C)[:, None] & in_o[None, :], other=0.0)
        total = add_product(total, values, factors, PRECISION)
    if BIAS:
        total += tl.load(bias + o, mask=in_o, other=0.0).to(tl.float32)[None, :]
    row = v * (B_OUT * B_OUT) + y * B_OUT + x
    tl.store(at(out, row, o, C_OUT), total, mask=inside[:, None] & in_o[None, :])


@triton.jit
def _weight_gradient_kernel(
    grad, cells, neighbours, partial, V, RUN,
    C: tl.constexpr, C_OUT: tl.constexpr, B: tl.constexpr, B_OUT: tl.constexpr, K_Y: tl.constexpr,
    K_X: tl.constexpr, LO_Y: tl.constexpr, LO_X: tl.constexpr, D_Y: tl.constexpr, D_X: tl.constexpr,
    STRIDE: tl.constexpr, REACH: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """One tap of the weight, ROWS of C_OUT by COLUMNS of C, over a run of RUN tiles of DEPTH output cells."""
    o_tiles: tl.constexpr = (C_OUT + ROWS - 1) // ROWS
    part, c = my_tile(C, COLUMNS)
    o = part % o_tiles * ROWS + tl.arange(0, ROWS)
    tap, run = part // o_tiles % (K_Y * K_X), part // o_tiles // (K_Y * K_X)
    in_o, in_c = o < C_OUT, c < C
    down, right = tap // K_X * D_Y - LO_Y + REACH * B, tap % K_X * D_X - LO_X + REACH * B
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(RUN):
        cell = (run * RUN + tile) * DEPTH + tl.arange(0, DEPTH)
        v = cell // (B_OUT * B_OUT)
        at_y, at_x = cell // B_OUT % B_OUT * STRIDE + down, cell % B_OUT * STRIDE + right
        row, there = source(neighbours, v, at_y, at_x, v < V, V, B, 1, REACH)
        values = tl.load(at(cells, row, c, C), mask=there[:, None] & in_c[None, :], other=0.0)
        outer = tl.load(at(grad, cell, o, C_OUT), mask=(v < V)[:, None] & in_o[None, :], other=0.0)
        total = add_product(total, tl.trans(outer), values, PRECISION)
    place = (run * C_OUT + o) * (K_Y * K_X) + tap
    tl.store(at(partial, place, c, C), total, mask=in_o[:, None] & in_c[None, :])


@operator("(Tensor cells, Tensor weight, Tensor? bias, Tensor neighbours, int[] y, int[] x) -> Tensor")
def implicit_gemm(
    cells: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, y: Sequence[int], x: Sequence[int]
) -> Tensor:
    """Convolve, all channels with all.

    Args:
        cells: (V, b, b, C), fp32, bf16 or fp16; sums are fp32. fp32 is multiplied in TF32 where PyTorch's
            convolutions are (`torch.backends.cudnn.conv.fp32_precision`).
        weight: (O, C, ky, kx), read as it lies if channels_last.
        bias: (O,) or None.
        neighbours: (V, 2R+1, 2R+1) int32, the patch in each direction, V where there is none
            (`VisiblePatches.neighbourhood`), R patches as far as the layer looks.
        y, x: the fields of `Axis`.

    Returns:
        (V, b/stride, b/stride, O).

    Raises:
        ValueError: a layer that looks beyond the table, or too many rows.
    """
    out = outputs_like(cells, weight, bias, neighbours, y, x)
    axes = Axis(*y), Axis(*x)
    c, taps = weight.shape[1], weight[0, 0].numel()
    lo, strides = (axes[0].lo, axes[1].lo), (0, c, 1, taps * c)
    _convolve(cells, weight, bias, neighbours, out, axes, lo, (axes[0].stride, 1), strides)
    return out


@operator("(Tensor grad, Tensor weight, Tensor neighbours, int[] y, int[] x) -> Tensor")
def implicit_gemm_input_gradient(
    grad: Tensor, weight: Tensor, neighbours: Tensor, y: Sequence[int], x: Sequence[int]
) -> Tensor:
    """The gradient of `implicit_gemm` with respect to its cells: (V, b/stride, b/stride, O) -> (V, b, b, C)."""
    out = _cells_like(grad, weight, neighbours, y, x)
    axes = Axis(*y), Axis(*x)
    c, taps = weight.shape[1], weight[0, 0].numel()
    lo = (axes[0].reach - 1 - axes[0].lo, axes[1].reach - 1 - axes[1].lo)
    strides = ((taps - 1) * c, -c, taps * c, 1)  # the last tap first
    _convolve(grad, weight, None, neighbours, out, axes, lo, (1, axes[0].stride), strides)
    return out


@operator("(Tensor grad, Tensor cells, Tensor neighbours, int[] y, int[] x) -> Tensor")
def implicit_gemm_weight_gradient(
    grad: Tensor, cells: Tensor, neighbours: Tensor, y: Sequence[int], x: Sequence[int]
) -> Tensor:
    """The gradient of `implicit_gemm` with respect to its weight: (O, C, ky, kx), fp32, channels_last."""
    axes = Axis(*y), Axis(*x)
    (count, b, _, c), (b_out, o) = cells.shape, grad.shape[2:]
    reach = reach_of(neighbours, axes, b)
    rows_of(grad, cells, neighbours[..., None])
    taps = axes[0].kernel * axes[1].kernel
    rows, columns, depth, warps = product_tiles(o, c, 64, cells.element_size(), least=256)
    programs = taps * -(-o // rows) * -(-c // columns)
    tiles = -(-grad.shape[:-1].numel() // depth)
    run = max(1, -(-tiles // max(1, WAVES // programs)))
    runs = -(-tiles // run)
    partial = cells.new_empty(runs, o, axes[0].kernel, axes[1].kernel, c, dtype=torch.float32)
    if runs:
        with on_device(cells):
            _weight_gradient_kernel[(runs * programs,)](
                grad.contiguous(), cells.contiguous(), neighbours.contiguous(), partial, count, run,
                c, o, b, b_out, axes[0].kernel, axes[1].kernel, axes[0].lo, axes[1].lo, axes[0].dilation,
                axes[1].dilation, axes[0].stride, reach, _precision(), rows, columns, depth, num_warps=warps,
                num_stages=STAGES,
            )  # fmt: skip
    return (partial[0] if runs == 1 else partial.sum(0)).permute(0, 3, 1, 2)


def _convolve(
    cells: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, out: Tensor,
    axes: tuple[Axis, Axis], lo: tuple[int, int], steps: tuple[int, int], strides: tuple[int, int, int, int],
) -> None:  # fmt: skip
    """Launch the kernel.

    Args:
        lo: cells before the first output.
        steps: (UP, DOWN), from outputs to cells.
        strides: of the weight in memory as (O, ky, kx, C): where the first tap is, and from tap to tap, channel of
            `cells` to channel, and channel of `out` to channel.
    """
    y, x = axes
    (count, b, _, c), (_, b_out, _, o), down = cells.shape, out.shape, steps[1]
    reach = reach_of(neighbours, axes, max(b, b_out))
    rows_of(cells, out, neighbours[..., None])
    sorted_by_taps = y.dilation == x.dilation == 1 and min(y.kernel, x.kernel) >= down  # no class without a tap
    phases = down if sorted_by_taps else 1
    rows, columns, depth, warps = product_tiles(out.shape[:-1].numel(), o, c, cells.element_size())
    programs = phases**2 * -(-count * (b_out // phases) ** 2 // rows) * -(-o // columns)
    if programs:
        with on_device(out):
            _convolve_kernel[(programs,)](
                cells.contiguous(), weight.permute(0, 2, 3, 1).contiguous(),
                weight if bias is None else bias.contiguous(), neighbours.contiguous(), out, count,
                c, o, b, b_out, y.kernel, x.kernel, *lo, y.dilation, x.dilation, *steps, reach, phases, *strides,
                bias is not None, _precision(), rows, columns, depth, num_warps=warps, num_stages=STAGES,
            )  # fmt: skip


def _precision() -> str:
    """How the tensor cores take fp32: as PyTorch's convolutions. Other dtypes are exact in their products."""
    precision = attrgetter("conv.fp32_precision")(torch.backends.cudnn)  # its type knows no `conv`
    return "tf32" if precision == "tf32" else "ieee"


@torch.library.register_fake(implicit_gemm_input_gradient)
def _cells_like(grad: Tensor, weight: Tensor, neighbours: Tensor, y: Sequence[int], x: Sequence[int]) -> Tensor:
    b = grad.shape[1] * Axis(*y).stride
    return grad.new_empty(grad.shape[0], b, b, weight.shape[1])


@torch.library.register_fake(implicit_gemm_weight_gradient)
def _weight_like(grad: Tensor, cells: Tensor, neighbours: Tensor, y: Sequence[int], x: Sequence[int]) -> Tensor:
    shape = (grad.shape[3], Axis(*y).kernel, Axis(*x).kernel, cells.shape[3])
    return cells.new_empty(shape, dtype=torch.float32).permute(0, 3, 1, 2)


implicit_gemm_with_gradient = neighbour_operator(
    implicit_gemm, implicit_gemm_input_gradient, implicit_gemm_weight_gradient
)
