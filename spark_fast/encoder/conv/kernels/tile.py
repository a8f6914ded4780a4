"""How the work of a kernel is cut: tiles of rows (cells) by channels, and what the index arithmetic can hold.

A row is the C channels of one cell, contiguous in memory. A tile takes a power of two of channels: where one of 32 or
more divides C no lane is idle (C = 96: 32), else the next above C, at most 128. Programs number the channel tiles of a
row first, so that neighbouring programs read neighbouring sectors, in one grid dimension, which alone takes more than
65535.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from spark_fast.encoder.conv.geometry import Axis

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
PROCESSORS = 132  # of an H100 or H200
WAVES = 512  # programs that fill such a GPU a few times over


@triton.jit
def my_tile(C: tl.constexpr, CHANNELS: tl.constexpr):
    """Which tile of rows is this program's, and which channels."""
    channel_tiles: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    pid = tl.program_id(0)
    return pid // channel_tiles, pid % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)


@triton.jit
def at(first, row, c, C: tl.constexpr):
    """Where channels c of these rows are, (rows, channels): rows fit in int32, elements need not."""
    return first + row.to(tl.int64)[:, None] * C + c[None, :]


@triton.jit
def source(
    neighbours, v, at_y, at_x, wanted, V, B: tl.constexpr, DOWN: tl.constexpr, REACH: tl.constexpr
):  # fmt: skip
    """The row of the packed cells at (at_y, at_x) around patch v, and whether there is one.

    Coordinates are in 1/DOWN cells from the corner of the first neighbour; those between cells are none.
    """
    side: tl.constexpr = 2 * REACH + 1
    y, x = at_y // DOWN, at_x // DOWN
    if DOWN > 1:
        wanted = wanted & (y * DOWN == at_y) & (x * DOWN == at_x)
    patch = tl.load(neighbours + (v * side + y // B) * side + x // B, mask=wanted, other=V).to(tl.int32)
    return patch * (B * B) + y % B * B + x % B, patch < V


@triton.jit
def add_product(total, left, right, PRECISION: tl.constexpr):
    """total + left @ right on tensor cores: fp32 in PRECISION, products of other dtypes are exact, sums are fp32."""
    if INTERPRETED:  # its dot takes bf16 for integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


def channel_tile(channels: int, largest: int = 128) -> int:
    """Channels per tile."""
    divisor = min(channels & -channels, largest)
    return divisor if divisor >= 32 else min(_power_of_two(channels), largest)


def row_tile(rows: int, channel_tiles: int, most: int, least: int = 16, programs: int = WAVES) -> int:
    """Rows per tile: halved from `most` until there are enough programs for the device, down to `least`."""
    while most > least and -(-rows // most) * channel_tiles < programs:
        most //= 2
    return most


def product_tiles(rows: int, columns: int, depth: int, element: int, least: int = 64) -> tuple[int, int, int, int]:
    """Of a matrix product on tensor cores: tiles of rows, columns and what is summed over (128 bytes), and warps.

    Tensor cores take 16 at least. The largest tile, 256 x 128 by 8 warps, keeps its sums in 128 registers a thread; in
    fp32 it is 128 x 128, for products that are not TF32 need more of them. Rows are halved down to `least` until there
    is a program for every processor.
    """
    wide = min(128, max(16, _power_of_two(columns)))
    high = row_tile(rows, -(-columns // wide), min(512 // element, max(16, _power_of_two(rows))), least, PROCESSORS)
    deep = min(depth & -depth if depth % 32 == 0 else max(16, _power_of_two(depth)), 128 // element)
    return high, wide, deep, 8 if high * wide >= 128 * 128 else 4


def row_block(channels: int) -> tuple[int, int, int]:
    """Of a kernel that holds whole rows: rows, channels (the next power of two) and warps, 16 elements for a thread."""
    wide = _power_of_two(channels)
    high = max(1, 2048 // wide)
    return high, wide, min(16, max(4, high * wide // 512))


def column_runs(row_tiles: int, channel_tiles: int) -> tuple[int, int]:
    """Of a sum over rows: runs of tiles, of which each program goes over one, and the tiles of a run.

    About as many programs as fill the device; each writes a row of sums, so more would only write more.
    """
    tiles = max(1, -(-row_tiles * channel_tiles // WAVES))
    return -(-row_tiles // tiles), tiles


def _power_of_two(least: int) -> int:
    """The first that is no smaller."""
    return 1 << (least - 1).bit_length()


def rows_of(*tensors: Tensor) -> None:
    """Check that the rows of (..., C) tensors can be numbered in int32, with room for a tile; elements need not be.

    Raises:
        ValueError: they cannot.
    """
    for tensor in tensors:
        if tensor.shape[:-1].numel() >= 2**30:
            raise ValueError(
                f"{tuple(tensor.shape)} has more than 2^30 rows, too many for the GPU kernels: use a smaller batch"
            )


def map_rows(x: Tensor) -> Tensor:
    """A map (N, C, H, W) in channels_last, whose rows are its cells. Raises ValueError: see `rows_of`."""
    rows_of(x.permute(0, 2, 3, 1))
    return x.contiguous(memory_format=torch.channels_last)


def map_like(x: Tensor) -> Tensor:
    """Room for a map like (N, C, H, W), in channels_last."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Make the device of `tensor`, of any shape, the current one, on which Triton launches. No effect on a CPU."""
    return torch.cuda.device_of(tensor)


def reach_of(neighbours: Tensor, axes: tuple[Axis, Axis], b: int) -> int:
    """The reach in patches of a table `neighbours`, (V, 2*reach+1, 2*reach+1).

    Raises:
        ValueError: the layer looks further.
    """
    reach = neighbours.shape[1] // 2
    furthest = max(max(axis.lo, axis.hi) for axis in axes)
    if furthest > reach * b:
        raise ValueError(
            f"the layer looks {furthest} cells beyond patches of {b}, the neighbours reach {reach} patches"
        )
    return reach
