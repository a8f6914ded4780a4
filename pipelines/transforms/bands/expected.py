"""Checks of image files with any number of channels, made on their headers before memory is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.decode import MAX_PIXELS, check_size

NUMBERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64")  # that are read


class Stored(NamedTuple):
    """An image as its file holds it."""

    pixels: NDArray  # (H, W, channels), of one of NUMBERS in any byte order
    alpha: bool = False  # whether the last channel is said to be transparency


@dataclass(frozen=True)
class Expected:
    """What every image must be. `channels_first` and `npz_key` are for arrays alone."""

    in_chans: int
    max_pixels: int = MAX_PIXELS
    channels_first: bool = False  # .npy and .npz hold (C, H, W), not (H, W, C)
    npz_key: str = ""  # the array of an .npz; "": the only one

    def check(
        self, height: int, width: int, channels: int, dtype: np.dtype | str, *, alpha: bool = False, hint: str = ""
    ) -> None:
        """Raise ImageError for a header that announces an image of other channels or numbers, or too large a one.

        `hint`: what to do about other channels, for the message.
        """
        check_size(height, width, self.max_pixels)
        if channels != self.in_chans and not (alpha and channels == self.in_chans + 1):
            raise ImageError(f"it has {channels} channels where --in_chans is {self.in_chans}{hint}")
        if (name := np.dtype(dtype).name) not in NUMBERS:
            raise ImageError(f"its numbers have type {name}; supported are {', '.join(NUMBERS)}")
