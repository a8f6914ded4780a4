"""An antialiased bicubic resize of any numbers, as two batched products of small dense matrices.

A resize of lines of pixels is a product with a banded matrix: an output line is a sum of some six input lines.
Blocks of 16 output lines depend on some 30 input lines each, which begin at equal distances. So the blocks' inputs are
overlapping views of one tensor, and all blocks are one batched product of dense matrices. torch's `interpolate` adds
floating point term by term, which takes two to four times as long; and a thread that makes few calls seldom waits for
Python's lock.
"""

from __future__ import annotations

from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spark_fast.pipelines.transforms.device_augment import cubic

_LINES = 16  # of a block
_AT_ONCE = 2**20  # numbers that are copied to floating point at a time: no more than stay in a cache


def resized(pixels: NDArray, size: tuple[int, int]) -> Tensor:
    """(h, w, C) -> (*size, C), not clipped where the bicubic kernel overshoots; a view.

    In float32; in float64 for numbers that float32 does not hold, and where torch may round products of float32 to
    fewer bits (`torch.set_float32_matmul_precision`).
    """
    precision = attrgetter("matmul.fp32_precision")(torch.backends.mkldnn)  # its type knows no `matmul`
    exact = precision in ("none", "ieee")
    dtype = torch.float32 if exact and np.can_cast(pixels.dtype, np.float32) else torch.float64
    fewer_rows = _resized_lines(pixels, size[0], dtype)  # (H, w, C)
    columns = fewer_rows.numpy().transpose(1, 0, 2)  # -> (w, H, C)
    return _resized_lines(columns, size[1], dtype).transpose(0, 1)  # (W, H, C) -> (H, W, C)


def _resized_lines(pixels: NDArray, size: int, dtype: torch.dtype) -> Tensor:
    """(n, m, C) -> (size, m, C) of `dtype`: along the first axis."""
    length, across, channels = pixels.shape
    width = max(_AT_ONCE // (length * channels), 1)
    parts = [_product(pixels[:, start : start + width], size, dtype) for start in range(0, across, width)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _product(pixels: NDArray, size: int, dtype: torch.dtype) -> Tensor:
    """The same for as many columns as are worth a copy."""
    blocks = _blocks(len(pixels), size, dtype)
    count, _, taken = blocks.weights.shape
    after = blocks.before + len(pixels)
    end = max(blocks.first + (count - 1) * blocks.step + taken, after)
    lines = torch.empty(end, *pixels.shape[1:], dtype=dtype)
    numbers = lines.numpy()
    numbers[: blocks.before], numbers[after:] = 0, 0  # these have no weight
    copy_pixels(numbers[blocks.before : after], pixels)
    row = lines[0].numel()
    inputs = lines.as_strided((count, taken, row), (blocks.step * row, row, 1), blocks.first * row)
    return torch.bmm(blocks.weights, inputs).view(-1, *pixels.shape[1:])[:size]  # (blocks, _LINES, m * C) -> lines


def copy_pixels(out: NDArray, pixels: NDArray) -> None:
    """Write an image, (h, w, C) in any order of rows and columns, into another; pixel by pixel where types agree.

    NumPy and torch copy a transposed image number by number, which takes two to eight times as long.
    """
    if out.dtype == pixels.dtype and pixels.strides[2] == out.strides[2] == out.itemsize:
        whole = np.dtype((np.void, out.shape[2] * out.itemsize))
        out, pixels = out.view(whole), pixels.view(whole)
    out[:] = pixels


class _Blocks(NamedTuple):
    """How output lines are made of input lines, before which `before` lines of zeros lie.

    Block i is `weights[i]`, (_LINES, taken), times `taken` lines from `first + i * step` on.
    """

    weights: Tensor
    before: int
    first: int
    step: int


@lru_cache(256)
def _blocks(length: int, size: int, dtype: torch.dtype) -> _Blocks:
    """Those that resize `length` lines to `size`, as `device_augment.bicubic_weights` does; the last may go beyond."""
    scale = length / size
    reach = 2 * max(scale, 1.0)  # of the kernel
    count = -(-size // _LINES)
    centres = ((torch.arange(count * _LINES, dtype=torch.float64) + 0.5) * scale).clamp(max=length).view(count, _LINES)
    step = round(_LINES * scale)
    steps = step * torch.arange(count)
    first = int(((centres[:, 0] - reach).floor() - steps).min())
    taken = int(((centres[:, -1] + reach).ceil() - steps).max()) - first
    lines = (first + steps)[:, None] + torch.arange(taken)  # (blocks, taken)
    weights = cubic((lines[:, None] + 0.5 - centres[..., None]) / max(scale, 1.0))  # (blocks, _LINES, taken)
    weights = torch.where(((lines >= 0) & (lines < length))[:, None], weights, 0.0)
    before = max(-first, 0)
    return _Blocks((weights / weights.sum(2, keepdim=True)).to(dtype), before, before + first, step)
