"""What stands in for an unreadable image, and how bad images are counted and named, for every backend.

An unreadable image must not end a training run of days, and must not go unnoticed either: its place is
taken by the next readable image in the listing, a function of the data alone, and it is counted and named.
Images that are read, but not whole (16 bits, a fourth band), are counted once and told in one warning a kind.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from spark_fast.commands import command
from spark_fast.errors import DataError
from spark_fast.pipelines.base import BadImageCounts
from spark_fast.pipelines.sources.losses import counted
from spark_fast.pipelines.sources.source import Source
from spark_fast.pipelines.transforms.pillow_pixels import Loss

logger = logging.getLogger("spark_fast.pipelines")

SUBSTITUTES = 16  # how many following images are tried
JUDGED_AFTER = 1000  # images read before `max_bad_fraction` is applied, and losses are first told
NAMED = 10  # substituted images that a message lists


class Loaded(NamedTuple):
    """What happened to one sample."""

    converted: bool  # the image is no colour JPEG
    substituted: str | None  # why the sample's own image could not be read
    losses: tuple[Loss, ...] = ()  # what of the image became no pixels


def candidates(source: Source, sample: int) -> Iterator[int]:
    """The sample itself, then the images that may stand in for it, in the order in which they are tried."""
    return ((sample + attempt) % len(source) for attempt in range(1 + SUBSTITUTES))


def none_readable(source: Source, sample: int, reason: Exception | None) -> DataError:
    """What to raise when no candidate can be read, the sample itself for this `reason`."""
    question = ": is the storage still available?" if isinstance(reason, OSError) else ""
    return DataError(
        f"image {sample} ({source.name(sample)}) cannot be read ({reason}), and neither can the {SUBSTITUTES}"
        f" images after it{question}"
    )


class BadImages:
    """What one pipeline met so far: `counts` has every reading, the log names each bad image once."""

    def __init__(self, source: Source, max_bad_fraction: float) -> None:
        self.counts = BadImageCounts()
        self.ends_epoch = False  # with the next batch that is counted
        self._source = source
        self._max_bad_fraction = max_bad_fraction
        self._warned: set[int] = set()
        self._losses: Counter[Loss] | None = Counter()  # of the images of the first epoch, until they are told
        self._seen = np.zeros(len(source), bool)
        self._told_early = False

    def count(self, ids: Sequence[int], loaded: Sequence[Loaded]) -> None:
        """Add a batch that is about to be delivered; DataError when too many images had to be substituted."""
        counts = self.counts
        counts.read += len(loaded)
        counts.converted += sum(sample.converted for sample in loaded)
        for i, sample in zip(ids, loaded, strict=True):
            if sample.substituted is not None:
                counts.substituted += 1
                self._warn(i, sample.substituted)
            elif sample.losses and self._losses is not None and not self._seen[i]:
                self._losses.update(sample.losses)
        self._seen[ids] = True
        self.tell_losses()
        if counts.read >= JUDGED_AFTER and counts.substituted > self._max_bad_fraction * counts.read:
            raise DataError(
                f"{counts.substituted} of {counts.read} images read so far were unreadable and substituted,"
                f" more than max_bad_fraction = {self._max_bad_fraction:g}. Repair or remove them, or convert"
                f" the data ({command('convert')} leaves them out). The first:\n  "
                + "\n  ".join(counts.first_substituted)
            )

    def tell_losses(self) -> None:
        """One warning a kind, after JUDGED_AFTER images, and with the true counts at the end of the first epoch."""
        early = self.counts.read >= JUDGED_AFTER and not self._told_early
        if self._losses is None or not (early or self.ends_epoch):
            return
        self._told_early = True
        for kind in counted(self._losses):
            logger.warning(kind.told(f"the {self._seen.sum()} images read so far"))
        if self.ends_epoch:
            self._losses = None

    def _warn(self, i: int, reason: str) -> None:
        if i in self._warned:
            return
        self._warned.add(i)
        name = self._source.name(i)
        if len(self.counts.first_substituted) < NAMED:
            self.counts.first_substituted.append(f"{i} {name}: {reason}")
        logger.warning("image %d (%s) is unreadable and replaced by the next readable one: %s", i, name, reason)
