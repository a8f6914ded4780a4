"""How the work of a kernel is cut: tiles of rows (cells) by channels, and what the index arithmetic can hold.

A row is the C channels of one cell, contiguous in memory. A tile takes a power of two of channels: where one of 32 or
more divides C no lane is idle (C = 96: 32), else the next above C, at most 128. Programs number the channel tiles of a
row first, so that neighbouring programs read neighbouring sectors, in one grid dimension, which alone takes more than
65535.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

WAVES = 512  # programs that fill a large GPU (132 multiprocessors) a few times over


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


def channel_tile(channels: int, largest: int = 128) -> int:
    """Channels per tile."""
    divisor = min(channels & -channels, largest)
    return divisor if divisor >= 32 else min(1 << (channels - 1).bit_length(), largest)


def row_tile(rows: int, channel_tiles: int, most: int, least: int = 16) -> int:
    """Rows per tile: halved from `most` until there are enough programs for the device, down to `least`."""
    while most > least and -(-rows // most) * channel_tiles < WAVES:
        most //= 2
    return most


def rows_of(*tensors: Tensor) -> None:
    """Check that the rows of (..., C) tensors can be numbered in int32, with room for a tile; elements need not be.

    Raises:
        ValueError: they cannot.
    """
    for tensor in tensors:
        if tensor.shape[:-1].numel() >= 2**30:
            raise ValueError(
                f"{tuple(tensor.shape)} is more than 2^30 rows, too many for the GPU kernels: use a smaller batch"
            )


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it the tensor's. Nothing on a CPU."""
    return torch.cuda.device_of(tensor)
