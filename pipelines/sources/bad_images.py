"""Counting and naming odd images, the same for every backend that decodes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from spark_fast.pipelines.base import DataError, Problems
from spark_fast.pipelines.sources.folder import Source
from spark_fast.pipelines.sources.load_sample import Loaded

logger = logging.getLogger("spark_fast.pipelines")

JUDGED_AFTER = 1000  # images read before `max_bad_fraction` is applied
NAMED = 10  # replaced images that a message lists


class Tally:
    """What one pipeline met so far: `problems` counts every reading, the log names each bad image once."""

    def __init__(self, source: Source, max_bad_fraction: float) -> None:
        self.problems = Problems()
        self._source = source
        self._max_bad_fraction = max_bad_fraction
        self._warned: set[int] = set()

    def count(self, ids: Iterable[int], loaded: Sequence[Loaded]) -> None:
        """Add a batch that is about to be delivered; DataError when too many images had to be replaced."""
        problems = self.problems
        problems.read += len(loaded)
        problems.converted += sum(sample.converted for sample in loaded)
        for i, sample in zip(ids, loaded, strict=True):
            if sample.replaced is not None:
                problems.replaced += 1
                self._warn(i, sample.replaced)
        if problems.read >= JUDGED_AFTER and problems.replaced > self._max_bad_fraction * problems.read:
            raise DataError(
                f"{problems.replaced} of {problems.read} images read so far were unreadable and replaced,"
                f" more than max_bad_fraction = {self._max_bad_fraction:g}. Repair or remove them, or convert"
                " the data (tools/convert_imagenet.py leaves them out). The first:\n  "
                + "\n  ".join(problems.first_replaced)
            )

    def _warn(self, i: int, reason: str) -> None:
        if i in self._warned:
            return
        self._warned.add(i)
        name = self._source.name(i)
        if len(self.problems.first_replaced) < NAMED:
            self.problems.first_replaced.append(f"{i} {name}: {reason}")
        logger.warning("image %d (%s) is unreadable, the next readable one stands in: %s", i, name, reason)
