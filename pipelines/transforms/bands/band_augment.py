"""Crop, resize and turn images of any number of channels, of any type."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spark_fast.pipelines.transforms.bands.blocked_resize import resized
from spark_fast.pipelines.transforms.bands.scaling import BandNormalise
from spark_fast.pipelines.transforms.crops import Box, Turn
from spark_fast.pipelines.transforms.device_augment import DeviceAugment
from spark_fast.pipelines.transforms.resize import crop


def resized_bands(image: NDArray, box: Box, turn: int, size: tuple[int, int]) -> Tensor:
    """The crop `box` of `image` (h, w, C), antialiased bicubic, turned: (*size, C).

    In floating point, not clipped where the bicubic kernel overshoots. What needs no resize keeps its own dtype.
    """
    pixels = turned(crop(image, box), turn)
    return torch.from_numpy(np.array(pixels)) if pixels.shape[:2] == size else resized(pixels, size)


def turned(pixels: NDArray, turn: int) -> NDArray:
    """(h, w, C), transposed and then flipped as the `Turn` says: a view."""
    pixels = pixels.swapaxes(0, 1) if turn & Turn.TRANSPOSED else pixels
    return pixels[:: -1 if turn & Turn.UPSIDE_DOWN else 1, :: -1 if turn & Turn.MIRRORED else 1]


def store_numbers(out: Tensor, pixels: Tensor) -> None:
    """Write `pixels` into `out`, its place in a batch, both (h, w, C); rounded and clipped if `out` holds integers."""
    numbers = pixels.numpy()
    dtype = out.numpy().dtype
    if dtype.kind in "ui" and numbers.dtype != dtype:
        limits = np.iinfo(dtype)
        numbers = np.rint(numbers).clip(limits.min, limits.max)
    out.numpy()[:] = numbers


class BandAugment(DeviceAugment):
    """Crops in cells to normalised images, as `DeviceAugment`, for any number of channels of any type."""

    def __init__(
        self, input_size: tuple[int, int], device: torch.device, dtype: torch.dtype, normalise: BandNormalise
    ) -> None:
        super().__init__(input_size, device, dtype)
        self._compute = torch.float32  # fp16 would hold no more than 11 bits
        self._normalise = normalise

    def __call__(self, cells: Tensor, crops: Tensor) -> Tensor:
        """Cells (B, *cell, C) of the batch's type and what `put` gave, (B, 3) int64, on the device -> (B, C, H, W)."""
        if cells.is_floating_point():  # beside a crop lies what was in the memory before: 0 * NaN is NaN
            down, across = (
                torch.arange(side, device=cells.device) < crops[:, i, None]  # (B, rows), (B, columns)
                for i, side in enumerate(cells.shape[1:3])
            )
            cells = torch.where((down[:, :, None] & across[:, None])[..., None], cells, 0.0)
        return self._normalise(self._resized(cells, crops).permute(0, 2, 3, 1))  # (B, C, H, W) -> (B, H, W, C)

    def _cut(self, image: NDArray, box: Box, turn: int, out: Tensor) -> None:
        height, width, _ = out.shape
        store_numbers(out, resized_bands(image, box, turn, (height, width)))
