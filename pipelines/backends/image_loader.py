"""From the file of an image to its place in a batch, and what happens when it cannot be read.

The host decodes this way: all images of the default pipeline, and those that FFCV cannot decode.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spark_fast.errors import ImageError
from spark_fast.pipelines.sources.bad_images import Loaded, candidates, none_readable
from spark_fast.pipelines.sources.beton import BetonSource
from spark_fast.pipelines.sources.shards import ShardSource
from spark_fast.pipelines.sources.source import Source, read_patiently
from spark_fast.pipelines.transforms.crops import Augmentation, Box
from spark_fast.pipelines.transforms.decode import MAX_PIXELS, decode_image
from spark_fast.pipelines.transforms.device_augment import DeviceAugment
from spark_fast.pipelines.transforms.pillow_pixels import Loss
from spark_fast.pipelines.transforms.resize import Normalise, cut, resized_crop


class Read(NamedTuple):
    """A decoded image, and what `Loaded` says of it."""

    pixels: NDArray  # (h, w, C)
    converted: bool
    losses: tuple[Loss, ...]


@dataclass(frozen=True)
class ImageLoader:
    """Loads images into their places in a batch, in the form that the batch has.

    A batch holds bytes, to be normalised on the device; normalised pixels, with `normalise`; or cells, with
    `device_augment`: the bytes of the crop, which the device resizes, flips and normalises.
    """

    source: Source
    augmentation: Augmentation
    normalise: Normalise | None = None
    device_augment: DeviceAugment | None = None
    max_pixels: int = MAX_PIXELS  # of an image that is read
    judged: NDArray[np.bool_] = field(init=False)  # (n,), images that `decode_image` approved, now or at conversion

    def __post_init__(self) -> None:
        memory = mmap.mmap(-1, len(self.source) + 1)  # shared with the processes that are forked from this one
        judged = np.frombuffer(memory, np.bool_)[:-1]
        judged[:] = judged_when_stored(self.source)
        object.__setattr__(self, "judged", judged)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "judged"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def load(self, sample: int, draws: Sequence[float], out: Tensor, crop: Tensor | None = None) -> Loaded:
        """Bring a sample's image, or the one that stands in for it, to its place `out`.

        Args:
            draws: the sample's DRAWS or ALL_DRAWS numbers in [0, 1), which decide crop and turn.
            out: (H, W, 3) uint8, or of the dtype of `normalise`; with `device_augment` a cell, (2H, 2W, 3).
            crop: (3,) int64, where height, width and turn of what is in the cell go; only with `device_augment`.

        Raises:
            DataError: neither the sample nor any image that may stand in can be read.
        """
        reason: Exception | None = None  # why the sample's own image cannot be read
        for i in candidates(self.source, sample):
            try:
                image, converted, losses = self.read(i)
            except (ImageError, OSError) as error:
                reason = reason or error
                continue
            self.judged[i] = True
            height, width, _ = image.shape
            box, turn = self.augmentation.box(draws, height, width), self.augmentation.turn(draws)
            if self.device_augment and crop is not None:
                crop.copy_(torch.tensor(self.place_cell(image, box, turn, out)))
            else:
                self.place(image, box, turn, out)
            return Loaded(converted, None if reason is None else str(reason), losses)
        raise none_readable(self.source, sample, reason)

    def read(self, i: int) -> Read:
        """Image i, (h, w, 3). Raises ImageError or OSError when it cannot be read."""
        data = read_patiently(self.source, i)
        image, what, losses = decode_image(data, self.max_pixels, judged=bool(self.judged[i]))
        return Read(image, what is not None, losses)

    def place(self, image: NDArray, box: Box, turn: int, out: Tensor) -> None:
        """The crop `box` of an image (h, w, 3), resized and turned, into its place `out`, (H, W, 3)."""
        if self.normalise:
            self.normalise.into(out, resized_crop(image, box, turn, self.augmentation.input_size))
        else:
            cut(image, box, turn, out)

    def place_cell(self, image: NDArray, box: Box, turn: int, cell: Tensor) -> tuple[int, int, int]:
        """Copy the crop into `cell`, (2H, 2W, 3), for the device to resize; returns as `DeviceAugment.put`."""
        assert self.device_augment is not None
        return self.device_augment.put(image, box, turn, cell)


def judged_when_stored(source: Source) -> bool:
    """Whether `decode_image` approved the images at conversion: then their checksums are compared on reading."""
    return isinstance(source, (ShardSource, BetonSource))
