"""What every pipeline promises, whatever it reads and wherever it decodes.

A pipeline is only a *decoder*: which samples make up a batch, and how each is cropped and flipped, is
decided by the pure functions of `sampler` and `transforms.crops`. So batch k is the same for any number of workers,
any number of ranks and any backend, and resuming in mid-epoch is starting at step k.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from spark_fast.pipelines.transforms.bands.statistics import Statistics


class Batch(NamedTuple):
    """One rank's share of one step."""

    images: Tensor  # (B, C, H, W) on the device, channels_last, normalised, dtype as asked
    labels: Tensor | None  # (B,) int64 on the device; None for unlabelled data
    ids: Tensor  # (B,) int64 on the host: the samples that the order asked for


@dataclass
class BadImageCounts:
    """Bad and converted images so far, counted as batches are delivered (an image counts once each time it is read)."""

    read: int = 0
    converted: int = 0  # readable, but no colour JPEG: grey, CMYK, palette, 16-bit, PNG named .JPEG ...
    substituted: int = 0  # unreadable, another image stood in
    first_substituted: list[str] = field(default_factory=list)  # "id name: reason" of the first ten such images


class Pipeline(Protocol):
    """Batches of one data set on one device, in the order that (seed, epoch) gives."""

    num_samples: int
    listing: str  # of the images, as `Source.fingerprint`
    labels: NDArray[np.int32] | None  # (num_samples,), None for unlabelled data
    num_classes: int  # 0 for unlabelled data
    classes: list[str]  # name of each label, empty when not known
    empty_classes: set[str]  # of these, the ones without an image
    bad_images: BadImageCounts
    statistics: Statistics | None  # by which the images are normalised; None: ImageNet's, as of photographs

    def __len__(self) -> int:
        """Steps per epoch; an incomplete last batch is dropped, unless the samples are read in order."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """The batches start_step, start_step + 1, ... of this epoch; closing it cancels the batches in preparation."""
        ...

    def close(self) -> None:
        """Release threads and files; no batch can be read afterwards."""
        ...
