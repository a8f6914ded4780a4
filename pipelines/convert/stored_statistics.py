"""The statistics of what a conversion stores, in the one pass that stores it.

Each shard's report holds the moments and counts of its images, by the type of their numbers. The manifest's statistics
are made of the reports alone, in the order of the shards, so they are the same for any number of processes and parts,
and after an interruption. There are some for each `--scale`: clipping to percentiles needs no second pass, as the
counts say how often each number occurs.
"""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import replace
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from spark_fast.pipelines.transforms.bands.scaling import batch_dtype, largest
from spark_fast.pipelines.transforms.bands.statistics import (
    HIGH,
    LOW,
    Counts,
    Measured,
    Moments,
    S,
    Statistics,
    clipped,
    total,
)

_WAITING = 16  # images whose counts are added at a time


class KindReport(TypedDict):
    """The moments and counts of a shard's images of one type, in plain types."""

    count: int
    mean: list[float]
    squares: list[float]
    counts: list[list[str]]  # of each channel: numbers, and how often each occurs


class Tally:
    """What is measured of a shard's images, by the type of their numbers."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}

    def add(self, pixels: NDArray) -> None:
        """An image, (H, W, channels)."""
        self._kinds.setdefault(pixels.dtype.name, _Kind()).add(pixels)

    def report(self) -> dict[str, KindReport]:
        """In plain types: {name of the type: moments and counts}; {} where nothing was measured."""
        return {name: _to_plain(kind.measured()) for name, kind in sorted(self._kinds.items())}


class _Kind:
    """The images of one type. Numbers of 16 bits are counted in a table, which is faster than to merge counts."""

    def __init__(self) -> None:
        self._moments: list[Moments] = []
        self._table: NDArray[np.int64] | None = None  # (channels, how many numbers there are)
        self._measured: list[Measured] = []

    def add(self, pixels: NDArray) -> None:
        if pixels.dtype.kind not in "ui" or pixels.dtype.itemsize > 2:
            self._measured.append(Measured.of(pixels))
            if len(self._measured) > _WAITING:
                self._measured = [self.measured()]
            return
        self._moments.append(Moments.of(pixels))
        self._lowest, size = int(np.iinfo(pixels.dtype).min), 2 ** (8 * pixels.dtype.itemsize)
        if self._table is None:
            self._table = np.zeros((pixels.shape[2], size), np.int64)
        for channel, row in enumerate(self._table):
            numbers = pixels[:, :, channel].ravel().astype(np.int64) - self._lowest
            row += np.bincount(numbers, minlength=size)

    def measured(self) -> Measured:
        if self._table is None:
            return _whole(self._measured)
        return Measured(_whole(self._moments), [Counts.of_table(row, self._lowest) for row in self._table])


def statistics_by_scale(reports: list[dict[str, KindReport]]) -> dict[str, dict]:
    """{dtype, percentile, none: `Statistics.to_dict`} from the shards' reports, in their order; {} for photographs."""
    kinds = {name: _whole(map(_from_plain, found)) for name, found in _by_kind(reports).items()}
    if not kinds:
        return {}
    whole = _whole(kinds.values())
    low, high = whole.percentile(LOW), whole.percentile(HIGH)
    scaled = {
        "dtype": _whole(_divided(kind.moments, largest(name)) for name, kind in kinds.items()),
        "percentile": clipped(whole.counts, low, high),
        "none": whole.moments,
    }
    dtype = batch_dtype(np.dtype(name) for name in kinds)
    without = Statistics("", dtype, (), (), low, high)
    return {
        scale: replace(without, scale=scale, mean=tuple(m.mean.tolist()), std=tuple(m.std.tolist())).to_dict()
        for scale, m in scaled.items()
    }


def _by_kind(reports: list[dict[str, KindReport]]) -> dict[str, list[KindReport]]:
    names = sorted({name for report in reports for name in report})
    return {name: [report[name] for report in reports if name in report] for name in names}


def _whole(parts: Iterable[S]) -> S:
    whole = total(parts)
    assert whole is not None  # there is no table, and no type in a report, without an image
    return whole


def _divided(moments: Moments, unit: float) -> Moments:
    return Moments(moments.count, moments.mean / unit, moments.squares / unit**2)


def _to_plain(measured: Measured) -> KindReport:
    moments = measured.moments
    counts = [[_packed(c.keys), _packed(c.counts)] for c in measured.counts]
    return {
        "count": moments.count,
        "mean": moments.mean.tolist(),
        "squares": moments.squares.tolist(),
        "counts": counts,
    }


def _from_plain(report: KindReport) -> Measured:
    moments = Moments(report["count"], np.array(report["mean"]), np.array(report["squares"]))
    counts = [Counts(_unpacked(k, np.dtype("<u4")), _unpacked(n, np.dtype("<i8"))) for k, n in report["counts"]]
    return Measured(moments, counts)


def _packed(numbers: NDArray) -> str:
    little = numbers.astype(numbers.dtype.newbyteorder("<"))
    return b64encode(zlib.compress(little.tobytes(), 1)).decode()


def _unpacked(text: str, dtype: np.dtype) -> NDArray:
    return np.frombuffer(zlib.decompress(b64decode(text)), dtype).astype(dtype.newbyteorder("="))
