"""What stands in for an unreadable image, and how bad images are counted and named, for every backend.

An unreadable image must not end a training run of days, and must not go unnoticed either: its place is
taken by the next readable image in the listing, a function of the data alone, and it is counted and named.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from spark_fast.commands import command
from spark_fast.errors import DataError
from spark_fast.pipelines.base import BadImageCounts
from spark_fast.pipelines.sources.source import Source

logger = logging.getLogger("spark_fast.pipelines")

SUBSTITUTES = 16  # how many following images are tried
JUDGED_AFTER = 1000  # images read before `max_bad_fraction` is applied
NAMED = 10  # substituted images that a message lists


class Loaded(NamedTuple):
    """What happened to one sample."""

    converted: bool  # the image is no colour JPEG
    substituted: str | None  # why the sample's own image could not be read


def candidates(source: Source, sample: int) -> Iterator[int]:
    """The sample itself, then the images that may stand in for it, in the order in which they are tried."""
    return ((sample + attempt) % len(source) for attempt in range(1 + SUBSTITUTES))


def none_readable(source: Source, sample: int, reason: str | None) -> DataError:
    """What to raise when no candidate can be read, the sample itself for this `reason`."""
    return DataError(
        f"image {sample} ({source.name(sample)}) cannot be read ({reason}), and neither can the {SUBSTITUTES}"
        " images after it: is the storage still there?"
    )


class BadImages:
    """What one pipeline met so far: `counts` has every reading, the log names each bad image once."""

    def __init__(self, source: Source, max_bad_fraction: float) -> None:
        self.counts = BadImageCounts()
        self._source = source
        self._max_bad_fraction = max_bad_fraction
        self._warned: set[int] = set()

    def count(self, ids: Iterable[int], loaded: Sequence[Loaded]) -> None:
        """Add a batch that is about to be delivered; DataError when too many images had to be substituted."""
        counts = self.counts
        counts.read += len(loaded)
        counts.converted += sum(sample.converted for sample in loaded)
        for i, sample in zip(ids, loaded, strict=True):
            if sample.substituted is not None:
                counts.substituted += 1
                self._warn(i, sample.substituted)
        if counts.read >= JUDGED_AFTER and counts.substituted > self._max_bad_fraction * counts.read:
            raise DataError(
                f"{counts.substituted} of {counts.read} images read so far were unreadable and substituted,"
                f" more than max_bad_fraction = {self._max_bad_fraction:g}. Repair or remove them, or convert"
                f" the data ({command('convert')} leaves them out). The first:\n  "
                + "\n  ".join(counts.first_substituted)
            )

    def _warn(self, i: int, reason: str) -> None:
        if i in self._warned:
            return
        self._warned.add(i)
        name = self._source.name(i)
        if len(self.counts.first_substituted) < NAMED:
            self.counts.first_substituted.append(f"{i} {name}: {reason}")
        logger.warning("image %d (%s) is unreadable, the next readable one stands in: %s", i, name, reason)
