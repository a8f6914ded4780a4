"""From the file of an image with any number of channels, of any type, to its place in a batch; see `image_loader`."""

from __future__ import annotations

from dataclasses import dataclass

from numpy.typing import NDArray
from torch import Tensor

from spark_fast.pipelines.backends.image_loader import ImageLoader, Read
from spark_fast.pipelines.sources.source import read_patiently
from spark_fast.pipelines.transforms.bands.band_augment import resized_bands, store_numbers
from spark_fast.pipelines.transforms.bands.decode_bands import decode_bands
from spark_fast.pipelines.transforms.bands.expected import Expected
from spark_fast.pipelines.transforms.bands.scaling import BandNormalise, as_batch
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from spark_fast.pipelines.transforms.crops import Box
from spark_fast.pipelines.transforms.resize import crop


@dataclass(frozen=True, kw_only=True)
class BandLoader(ImageLoader):
    """Loads images of any number of channels.

    A batch holds numbers as stored, to be normalised on the device; or cells of them; or, with `band_normalise`,
    normalised pixels.
    """

    expected: Expected
    statistics: Statistics
    band_normalise: BandNormalise | None = None

    def read(self, i: int) -> Read:
        """Image i, (h, w, C). Raises ImageError or OSError when it cannot be read, or not held by the batch's type."""
        pixels, losses = decode_bands(read_patiently(self.source, i), self.expected, judged=bool(self.judged[i]))
        as_batch(pixels[:0], self.statistics)  # raises where it cannot
        return Read(pixels, False, losses)

    def place(self, image: NDArray, box: Box, turn: int, out: Tensor) -> None:
        """The crop `box` of an image (h, w, C), resized and turned, into its place `out`, (H, W, C)."""
        inside = as_batch(crop(image, box), self.statistics)
        whole = Box(0, 0, box.height, box.width)
        pixels = resized_bands(inside, whole, turn, self.augmentation.input_size)
        if self.band_normalise:
            self.band_normalise.into(out, pixels)
        else:
            store_numbers(out, pixels)

    def place_cell(self, image: NDArray, box: Box, turn: int, cell: Tensor) -> tuple[int, int, int]:
        """Copy the crop into `cell`, (2H, 2W, C), for the device to resize; returns as `DeviceAugment.put`."""
        assert self.device_augment is not None
        inside = as_batch(crop(image, box), self.statistics)
        return self.device_augment.put(inside, Box(0, 0, box.height, box.width), turn, cell)
