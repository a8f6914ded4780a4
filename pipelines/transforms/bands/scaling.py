"""From stored numbers to network input: one type a batch, scaled to about [0, 1] as asked, and normalised.

A batch crosses the bus in the type of its files: a uint16 has half the bytes of a float32. So an image is scaled and
normalised in one step, on the device where there is one: (clip(x) - mean) / std, with the scale folded into both.
Resized pixels are rounded only where the batch holds integers and the device normalises.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.bands.blocked_resize import copy_pixels
from spark_fast.pipelines.transforms.bands.statistics import Statistics

SCALES = ("auto", "dtype", "percentile", "none")


def largest(dtype: np.dtype | str) -> float:
    """What `--scale dtype` divides by: an integer type's largest number, 1 for floating point."""
    dtype = np.dtype(dtype)
    return float(np.iinfo(dtype).max) if dtype.kind in "ui" else 1.0


def batch_dtype(dtypes: Iterable[np.dtype]) -> str:
    """The type in which images of these types share a batch: uint8, uint16, int16, or float32 for all else."""
    names = {np.dtype(dtype).name for dtype in dtypes}
    if names == {"uint8", "uint16"}:
        return "uint16"
    return names.pop() if len(names) == 1 and names <= {"uint8", "uint16", "int16"} else "float32"


def as_batch(pixels: NDArray, statistics: Statistics) -> NDArray:
    """An image (H, W, C) in the type of the batch.

    With `--scale dtype` the largest number of its own type becomes the largest of the batch's, or 1 in a float batch.
    Raises ImageError where the batch's type cannot hold its numbers.
    """
    stored, wanted = pixels.dtype, np.dtype(statistics.dtype)
    if stored == wanted:
        return pixels
    if wanted.kind == "f":
        factor = largest(stored) if statistics.scale == "dtype" else 1.0
        return (pixels / factor).astype(np.float32) if factor != 1 else pixels.astype(np.float32)
    if (stored.name, wanted.name) == ("uint8", "uint16"):
        return pixels.astype(np.uint16) * np.uint16(257 if statistics.scale == "dtype" else 1)
    raise ImageError(f"its numbers are {stored.name}, those of the images measured at the start {wanted.name}")


class BandNormalise:
    """(B, H, W, C) in the type of the batch, or floating point in its units -> (B, C, H, W) of `dtype`, channels_last.

    Pixels are scaled as the statistics say, then `(x - mean) / std`. A channel without deviation is only shifted.
    """

    def __init__(self, statistics: Statistics, width: int, device: torch.device, dtype: torch.dtype) -> None:
        low, high = np.array(statistics.low), np.array(statistics.high)
        unit, zero = np.full(len(low), largest(statistics.dtype)), np.zeros(len(low))
        if statistics.scale == "percentile":
            unit, zero = np.where(high > low, high - low, 1.0), low
        elif statistics.scale == "none":
            unit = np.ones(len(low))
        std = np.where(np.array(statistics.std) > 0, statistics.std, 1.0)
        self._mean = _row(zero + np.array(statistics.mean) * unit, width, device)  # (W * C,), in the batch's units
        self._factor = _row(1 / (std * unit), width, device)
        self._clip: tuple[Tensor, Tensor] | None = None
        if statistics.scale == "percentile":
            self._clip = _row(low, width, device), _row(np.maximum(high, low), width, device)
        elif np.dtype(statistics.dtype).kind in "ui":  # a bicubic resize overshoots
            limits = np.iinfo(statistics.dtype)
            self._clip = (
                _row(np.full(len(low), limits.min), width, device),
                _row(np.full(len(low), limits.max), width, device),
            )
        self._dtype = dtype

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise a batch in fp32 on the device of its pixels, then cast to dtype."""
        rows = pixels.flatten(-2).to(torch.float32, copy=True)  # (B, H, W * C)
        return self._normalised(rows).to(self._dtype).view(pixels.shape).permute(0, 3, 1, 2)

    def into(self, out: Tensor, pixels: Tensor) -> None:
        """The same for one image, (H, W, C), into its place in a batch, (H, W, C) of dtype."""
        place = out if out.dtype == torch.float32 else torch.empty(out.shape)
        copy_pixels(place.numpy(), pixels.numpy())
        self._normalised(place.flatten(-2))
        if place is not out:
            out.copy_(place)

    def _normalised(self, rows: Tensor) -> Tensor:
        """(..., H, W * C) float32, changed in place."""
        if self._clip is not None:
            rows.clamp_(*self._clip)
        return rows.sub_(self._mean).mul_(self._factor)


def scaled(pixels: NDArray, statistics: Statistics) -> NDArray[np.float64]:
    """An image in the type of the batch, as `--scale` maps it: (H, W, C) -> (H, W, C) float64."""
    if statistics.scale == "percentile":
        low, high = np.array(statistics.low), np.array(statistics.high)
        return (pixels.clip(low, high) - low) / np.where(high > low, high - low, 1.0)
    return pixels / (largest(statistics.dtype) if statistics.scale == "dtype" else 1.0)


def _row(channels: NDArray, width: int, device: torch.device) -> Tensor:
    """(C,) -> (width * C,), repeated along a row of pixels: broadcasting over a short innermost dimension is slow."""
    return torch.from_numpy(np.tile(channels, width)).float().to(device)
