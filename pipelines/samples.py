"""One sample from bytes to its place in the batch, and what happens when its image cannot be read.

An unreadable image must not end a training run of days, and must not go unnoticed either: its place is
taken by the next readable image in the listing, a function of the data alone, and the caller is told.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from pipelines.augment import cut
from pipelines.contract import DataError, ImageError
from pipelines.crops import Augmentation
from pipelines.decode import decode
from pipelines.sources import Source

SUBSTITUTES = 16  # how many following images are tried
RETRY_SECONDS = (0.05, 0.2)  # pauses after which a read is tried again: network file systems stumble


class Loaded(NamedTuple):
    """What happened to one sample."""

    converted: bool  # the image is no colour JPEG
    replaced: str | None  # why the sample's own image could not be read


def load_sample(source: Source, sample: int, draws: Sequence[float], augmentation: Augmentation, out: Tensor) -> Loaded:
    """Decode, crop, resize and flip a sample into `out`, (H, W, 3) uint8; or the image that stands in.

    Raises DataError when neither the sample nor any of its substitutes can be read.
    """
    reason: str | None = None
    for attempt in range(1 + SUBSTITUTES):
        try:
            image, converted = decode(read_patiently(source, (sample + attempt) % len(source)))
        except (ImageError, OSError) as error:
            reason = reason or str(error)
            continue
        height, width = image.shape[:2]
        cut(image, augmentation.box(draws, height, width), augmentation.flips(draws), out)
        return Loaded(converted, reason)
    raise DataError(
        f"image {sample} ({source.name(sample)}) cannot be read ({reason}), and neither can the {SUBSTITUTES}"
        " images after it: is the storage still there?"
    )


def read_patiently(source: Source, i: int) -> bytes | memoryview:
    """`source.read(i)`, tried again after a pause when the storage stumbles; raises what the last try did."""
    for pause in RETRY_SECONDS:
        try:
            return source.read(i)
        except OSError:  # noqa: PERF203
            time.sleep(pause)
    return source.read(i)
