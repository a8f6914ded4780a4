"""Statistics of images that come without them: measured on a sample of the files, the same one on every rank.

Order, threads and ranks do not matter: each image is measured alone, and the results are added in the sample's order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import DataError, ImageError
from spark_fast.pipelines.sampler import order
from spark_fast.pipelines.sources.source import Source, read_patiently
from spark_fast.pipelines.transforms.bands.decode_bands import decode_bands
from spark_fast.pipelines.transforms.bands.expected import Expected
from spark_fast.pipelines.transforms.bands.scaling import as_batch, batch_dtype, largest, scaled
from spark_fast.pipelines.transforms.bands.statistics import HIGH, LOW, Measured, Moments, Statistics, clipped, total

logger = logging.getLogger("spark_fast.pipelines")

SAMPLE = 1000  # files that are measured
_SEED = 0  # of the sample, whatever the run's

T = TypeVar("T")


@dataclass
class _Seen:
    """What the first look at some images finds."""

    dtypes: set[np.dtype]
    measured: Measured

    def __add__(self, other: _Seen) -> _Seen:
        return _Seen(self.dtypes | other.dtypes, self.measured + other.measured)


def measure(
    source: Source,
    expected: Expected,
    scale: str,
    *,
    workers: int = 2,
) -> Statistics:
    """The statistics of a source; `scale`: dtype, percentile or none.

    Raises DataError when no image of the sample can be read, with the first one's reason.
    """
    sample = order(len(source), _SEED, 0)[:SAMPLE].tolist()
    reasons: list[str] = []

    def of_each(what: Callable[[NDArray], T]) -> Iterator[T]:
        """Of the images that can be read, in the sample's order."""

        def of(i: int) -> T | None:
            try:
                return what(decode_bands(read_patiently(source, i), expected).pixels)
            except (ImageError, OSError) as error:
                reasons.append(f"{source.name(i)}: {error}")
                return None

        step = 8 * workers  # no more results wait than are soon taken
        with ThreadPoolExecutor(workers, thread_name_prefix="measure") as threads:
            for start in range(0, len(sample), step):
                yield from (found for found in threads.map(of, sample[start : start + step]) if found is not None)

    first = total(of_each(lambda pixels: _Seen({pixels.dtype}, Measured.of(pixels))))
    if first is None:
        raise DataError(f"none of the {len(sample)} images that were looked at can be read; {min(reasons)}")
    low, high = first.measured.percentile(LOW), first.measured.percentile(HIGH)
    statistics = Statistics(scale, batch_dtype(first.dtypes), (), (), low, high)
    moments: Moments | None = first.measured.moments
    unit = largest(*first.dtypes) if scale == "dtype" and len(first.dtypes) == 1 else 1.0
    if scale == "percentile":
        moments = clipped(first.measured.counts, low, high)
    elif scale == "dtype" and len(first.dtypes) > 1:
        moments = total(of_each(lambda pixels: Moments.of(scaled(as_batch(pixels, statistics), statistics))))
    if moments is None:
        raise DataError(f"the images changed while they were measured; {min(reasons)}")
    found = replace(statistics, mean=tuple((moments.mean / unit).tolist()), std=tuple((moments.std / unit).tolist()))
    _tell(found, len(sample), len(set(reasons)))
    return found


def _tell(found: Statistics, images: int, unreadable: int) -> None:
    numbers = (
        f"{name} {', '.join(f'{v:.5g}' for v in getattr(found, name))}" for name in ("mean", "std", "low", "high")
    )
    left_out = f", {unreadable} of them unreadable," if unreadable else ""
    logger.info(
        "measured on %d images%s with --scale %s, a number a channel: %s (low and high: the 0.1 and 99.9 percentiles)",
        images, left_out, found.scale, "; ".join(numbers),
    )  # fmt: skip
    if dead := [i for i, std in enumerate(found.std) if not std]:
        logger.warning("channels %s are the same number everywhere in these images", ", ".join(map(str, dead)))
