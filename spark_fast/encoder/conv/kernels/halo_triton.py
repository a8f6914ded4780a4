"""The window of every patch, its halo taken from the neighbours, and the sum of windows that is its gradient.

Packed cells (V, b, b, C) -> windows (V, n, m, C), n = b + lo + hi. Both kernels only move memory; where a cell comes
from is computed from the table of neighbours, so no index is stored (PyTorch's gather keeps 8 bytes per window cell and
8*K per cell, and copies the cells once to append a row of zeros).

With e bytes per element (cells of masked patches are not read, a cell that is read again comes from L2):

    gather   bytes = e*C*V*(b^2 + n*m)    FLOPs = 0
    sum      bytes = e*C*V*(b^2 + n*m)    FLOPs = C*V*n*m additions at most, in fp32

Each cell lies in at most 9 windows (the patch's own and its neighbours'), which are read and added in a fixed order:
no atomics, the same bits every time.

Worked example: the size of ConvNeXt-S's stage 1, 224 px, batch 128, mask 0.6 (V = 128*20 = 2560, b = 8, C = 96, bf16)
with a 3x3 kernel (n = 10): gather 31 + 49 = 81 MB, sum the same, 24 us each at the 3.35 TB/s of an H100.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from spark_fast.autograd import AutogradContext
from spark_fast.encoder.conv.kernels.operator import operator, with_gradient
from spark_fast.encoder.conv.kernels.tile import at, channel_tile, my_tile, on_device, rows_of


@triton.jit
def _gather_kernel(
    cells, neighbours, out, V, fill,
    C: tl.constexpr, B: tl.constexpr, N_Y: tl.constexpr, N_X: tl.constexpr, LO_Y: tl.constexpr, LO_X: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of the windows: each row is a cell of the patch or of one of its 8 neighbours, or `fill`."""
    tile, c = my_tile(C, CHANNELS)
    place = tile * ROWS + tl.arange(0, ROWS)  # row of `out`
    v = place // (N_Y * N_X)
    y = place // N_X % N_Y - LO_Y + B  # counted from the first cell of the neighbour before: 0 <= y < 3*B
    x = place % N_X - LO_X + B
    inside = v < V
    patch = tl.load(neighbours + v * 9 + y // B * 3 + x // B, mask=inside, other=V).to(tl.int32)
    row = patch * (B * B) + y % B * B + x % B
    in_c = (c < C)[None, :]
    values = tl.load(at(cells, row, c, C), mask=(patch < V)[:, None] & in_c, other=fill)
    tl.store(at(out, place, c, C), values, mask=inside[:, None] & in_c)


@triton.jit
def _sum_kernel(
    windows, neighbours, out, V,
    C: tl.constexpr, B: tl.constexpr, N_Y: tl.constexpr, N_X: tl.constexpr, LO_Y: tl.constexpr, LO_X: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of the cells: each sums its copies, at most one in the window of each of 9 patches, in fp32."""
    tile, c = my_tile(C, CHANNELS)
    cell = tile * ROWS + tl.arange(0, ROWS)
    v, y, x = cell // (B * B), cell // B % B, cell % B
    inside = v < V
    in_c = (c < C)[None, :]
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in tl.static_range(9):
        at_y = y - (step // 3 - 1) * B + LO_Y  # my place in the window of that neighbour
        at_x = x - (step % 3 - 1) * B + LO_X
        shown = inside & (at_y >= 0) & (at_y < N_Y) & (at_x >= 0) & (at_x < N_X)
        patch = tl.load(neighbours + v * 9 + step, mask=shown, other=V).to(tl.int32)
        place = patch * (N_Y * N_X) + at_y * N_X + at_x
        mask = (patch < V)[:, None] & in_c
        total += tl.load(at(windows, place, c, C), mask=mask, other=0.0).to(tl.float32)
    tl.store(at(out, cell, c, C), total, mask=inside[:, None] & in_c)


@operator("(Tensor cells, Tensor neighbours, int[] lo, int[] size, float fill=0.0) -> Tensor")
def gather_windows(
    cells: Tensor, neighbours: Tensor, lo: Sequence[int], size: Sequence[int], fill: float = 0.0
) -> Tensor:
    """The window of every patch.

    Args:
        cells: (V, b, b, C), fp32, bf16 or fp16.
        neighbours: (V, 3, 3) int32, the patch in each direction, V where there is none (`VisiblePatches.neighbourhood`)
        lo: window cells before the patch along y and x, at most b.
        size: of the window along y and x; at most b cells after the patch.
        fill: what stands where no patch is.

    Returns:
        (V, size_y, size_x, C).

    Raises:
        ValueError: a window that reaches beyond the next patch, or too many rows.
    """
    cells, out = cells.contiguous(), _windows_like(cells, neighbours, lo, size, fill)
    _launch(_gather_kernel, out, (cells, neighbours.contiguous(), out, len(cells), fill), cells, lo, size)
    return out


@operator("(Tensor windows, Tensor neighbours, int[] lo, int b) -> Tensor")
def sum_windows(windows: Tensor, neighbours: Tensor, lo: Sequence[int], b: int) -> Tensor:
    """The transpose of `gather_windows`: (V, n, m, C) -> (V, b, b, C), the sum over the windows that show each cell."""
    windows, out = windows.contiguous(), _cells_like(windows, neighbours, lo, b)
    _launch(_sum_kernel, out, (windows, neighbours.contiguous(), out, len(out)), out, lo, windows.shape[1:3])
    return out


def _launch(
    kernel: triton.JITFunction, out: Tensor, arguments: tuple, cells: Tensor, lo: Sequence[int], size: Sequence[int]
) -> None:
    b, channels = cells.shape[2:]
    if any(before > b or whole - b - before > b or before < 0 for before, whole in zip(lo, size, strict=True)):
        raise ValueError(
            f"a window of {tuple(size)} cells, {tuple(lo)} of them before the patch, looks beyond the next patch of {b}"
        )
    rows_of(arguments[0], out)
    tile = channel_tile(channels)
    rows = 4096 // max(tile, 64)
    programs = -(-out.shape[:-1].numel() // rows) * -(-channels // tile)
    if programs:
        with on_device(out):
            kernel[(programs,)](*arguments, channels, b, *size, *lo, rows, tile, num_warps=4)


@torch.library.register_fake(gather_windows)
def _windows_like(
    cells: Tensor, neighbours: Tensor, lo: Sequence[int], size: Sequence[int], fill: float = 0.0
) -> Tensor:
    return cells.new_empty(cells.shape[0], *size, cells.shape[3])


@torch.library.register_fake(sum_windows)
def _cells_like(windows: Tensor, neighbours: Tensor, lo: Sequence[int], b: int) -> Tensor:
    return windows.new_empty(windows.shape[0], b, b, windows.shape[3])


class _GatherContext(AutogradContext, Protocol):
    lo: Sequence[int]
    b: int


def _keep(ctx: _GatherContext, inputs: tuple, output: Tensor) -> None:
    cells, neighbours, ctx.lo, *_ = inputs
    ctx.b = cells.shape[1]
    ctx.save_for_backward(neighbours)


def _gradient(ctx: _GatherContext, grad: Tensor) -> tuple:
    return sum_windows(grad, ctx.saved_tensors[0], ctx.lo, ctx.b), None, None, None, None


gather_with_gradient = with_gradient(gather_windows, _keep, _gradient)
