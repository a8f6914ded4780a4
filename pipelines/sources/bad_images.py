"""Counting and naming odd images, the same for every backend that decodes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from spark_fast.commands import command
from spark_fast.errors import DataError
from spark_fast.pipelines.base import BadImageCounts
from spark_fast.pipelines.sources.folder import Source
from spark_fast.pipelines.sources.load_sample import Loaded

logger = logging.getLogger("spark_fast.pipelines")

JUDGED_AFTER = 1000  # images read before `max_bad_fraction` is applied
NAMED = 10  # substituted images that a message lists


class BadImages:
    """What one pipeline met so far: `bad_images` counts every reading, the log names each bad image once."""

    def __init__(self, source: Source, max_bad_fraction: float) -> None:
        self.bad_images = BadImageCounts()
        self._source = source
        self._max_bad_fraction = max_bad_fraction
        self._warned: set[int] = set()

    def count(self, ids: Iterable[int], loaded: Sequence[Loaded]) -> None:
        """Add a batch that is about to be delivered; DataError when too many images had to be substituted."""
        counts = self.bad_images
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
        if len(self.bad_images.first_substituted) < NAMED:
            self.bad_images.first_substituted.append(f"{i} {name}: {reason}")
        logger.warning("image %d (%s) is unreadable, the next readable one stands in: %s", i, name, reason)
