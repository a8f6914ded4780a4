"""An antialiased bicubic resize in float64, as products of small dense matrices.

A line of pixels that is reduced is a product with a banded matrix: an output pixel depends on some six input pixels.
torch's `interpolate` computes its few terms one by one for floating point, NumPy has no such operation. So 16 output
lines at a time are taken with the 20 to 30 input lines that they depend on, and these blocks are dense products. In
float64: products in float32 are rounded to bfloat16 where an option of torch's asks for it, and are little faster.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from numpy.typing import NDArray
from torch import Tensor

from spark_fast.pipelines.transforms.crops import Turn
from spark_fast.pipelines.transforms.device_augment import cubic

_LINES = 16  # of a block


def resized(pixels: NDArray, size: tuple[int, int], turn: int = 0) -> Tensor:
    """(h, w, C) of any numbers -> (*size, C) float64, not cut off where a bicubic curve overshoots; a view.

    Of the `turn` its flips are done.
    """
    fewer_rows = _resized_lines(pixels, size[0], flip=bool(turn & Turn.UPSIDE_DOWN))  # (H, w, C)
    columns = fewer_rows.numpy().transpose(1, 0, 2)  # -> (w, H, C)
    return _resized_lines(columns, size[1], flip=bool(turn & Turn.MIRRORED)).transpose(0, 1)  # (W, H, C) -> (H, W, C)


def _resized_lines(pixels: NDArray, size: int, *, flip: bool) -> Tensor:
    """(n, m, C) -> (size, m, C) float64: along the first axis."""
    count, firsts, weights = _weights(len(pixels), size, flip)
    out = torch.empty(size, *pixels.shape[1:], dtype=torch.float64)
    taken = torch.empty(count, *pixels.shape[1:], dtype=torch.float64)
    made, lines, numbers = out.flatten(1), taken.flatten(1), taken.numpy()
    for block, (first, weight) in enumerate(zip(firsts, weights, strict=True)):
        numbers[:] = pixels[first : first + count]
        torch.mm(weight, lines, out=made[block * _LINES : (block + 1) * _LINES])
    return out


@lru_cache(128)
def _weights(length: int, size: int, flip: bool) -> tuple[int, list[int], list[Tensor]]:
    """How many input lines each block of output lines is made of, the first one of each, and (_LINES, taken) float64.

    As `device_augment.bicubic_weights`; the last block may have fewer lines.
    """
    scale = length / size
    reach = 2 * max(scale, 1.0)  # of the kernel
    taken = min(length, math.ceil(_LINES * scale + 2 * reach) + 1)
    lines = torch.arange(-(-size // _LINES) * _LINES, dtype=torch.float64)  # those from `size` on are left out below
    centres = ((size - 1 - lines if flip else lines) + 0.5) * scale
    centres = centres.clamp(0, length).view(-1, _LINES)  # (blocks, _LINES)
    firsts = (centres.amin(1) - reach).floor().clamp(0, length - taken).long()
    middles = firsts[:, None] + torch.arange(taken) + 0.5  # of the input lines, (blocks, taken)
    weights = cubic((middles[:, None] - centres[..., None]) / max(scale, 1.0))  # (blocks, _LINES, taken)
    weights = (weights / weights.sum(2, keepdim=True)).flatten(0, 1)[:size]
    return taken, firsts.tolist(), list(weights.split(_LINES))
