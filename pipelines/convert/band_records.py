"""What a shard holds of an image of any channels and depth: its numbers as they are, in a .npy file.

Of the lossless formats a .npy is the one that holds any number of channels and any type, that every WebDataset tool and
DALI decode, and whose reading is a copy: see benchmarks/record_formats.py. (H, W, channels), little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import SettingsError
from spark_fast.pipelines.convert.reencode import Reencoded, StoredSize, check_max_pixels
from spark_fast.pipelines.convert.tiles import TileSource, Tiling
from spark_fast.pipelines.sources.folder import FileSource
from spark_fast.pipelines.sources.listing.image_names import BAND_EXTENSIONS
from spark_fast.pipelines.sources.shard_format import NPY
from spark_fast.pipelines.transforms.bands.arrays import npy_of
from spark_fast.pipelines.transforms.bands.band_augment import resized_bands
from spark_fast.pipelines.transforms.bands.decode_bands import decode_bands
from spark_fast.pipelines.transforms.bands.expected import Expected
from spark_fast.pipelines.transforms.crops import Box
from spark_fast.pipelines.transforms.decode import MAX_PIXELS


@dataclass(frozen=True)
class BandRecords(StoredSize):
    """Channels, and size, of the images; see `Reencode` for photographs."""

    max_pixels: int = MAX_PIXELS  # of an image, or of a tile; a larger one is refused
    in_chans: int = field(kw_only=True)
    channels_first: bool = False  # .npy and .npz hold (C, H, W)
    npz_key: str = ""  # the array of an .npz; "": the only one
    tiling: Tiling | None = None  # the samples are tiles of the files' images

    endings: ClassVar[tuple[str, ...]] = BAND_EXTENSIONS
    suffix: ClassVar[str] = NPY

    def __post_init__(self) -> None:
        super().__post_init__()
        check_max_pixels(self.max_pixels)
        if self.in_chans < 1:
            raise SettingsError(f"in_chans must be 1 or more, got {self.in_chans}")
        if self.tiling and self.tiling.tile**2 > self.max_pixels:
            raise SettingsError(f"a tile of side {self.tiling.tile} has more pixels than max_pixels allows")

    @property
    def _expected(self) -> Expected:
        return Expected(self.in_chans, self.max_pixels, self.channels_first, self.npz_key)

    def samples(self, source: FileSource) -> FileSource:
        """The source of the records: the images of `source`, or their tiles."""
        source.allow_pixels(self.max_pixels * self.in_chans)
        return TileSource.of(source, self.tiling, self._expected) if self.tiling else source

    def reencoded(self, data: bytes | memoryview) -> Reencoded:
        """The .npy to store for an encoded image: its own numbers, resized where it is too large.

        Raises ImageError when the image cannot be read.
        """
        expected = self._expected
        if self.tiling:  # a tile comes as a .npy of its own, (H, W, C)
            expected = replace(expected, channels_first=False, npz_key="")
        pixels, losses = decode_bands(data, expected)
        height, width, _ = pixels.shape
        size = self.size(height, width)
        if size != (height, width):
            resized = resized_bands(pixels, Box(0, 0, height, width), 0, size).numpy()
            pixels = _as_numbers(resized, pixels.dtype)
        return Reencoded(npy_of(pixels), None, losses, pixels)


def _as_numbers(resized: NDArray[np.floating], dtype: np.dtype) -> NDArray:
    """Rounded to these numbers; a bicubic curve's overshoots are cut off where they cannot hold them."""
    if dtype.kind not in "ui":
        return resized.astype(dtype)
    limits = np.iinfo(dtype)
    return np.rint(resized).clip(limits.min, limits.max).astype(dtype)
