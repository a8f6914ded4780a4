"""Statistics of images: exact mean and deviation of each channel, and percentiles. Those of parts can be merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import DataError

LOW, HIGH = 0.001, 0.999  # the percentiles that are kept
_BLOCK = 2**18  # pixels taken at a time, so that a large image needs no copy in float64
_COARSE = 8  # lowest bits of a float32 that a percentile does without
_SIGN = np.uint32(0x80000000)


class _Sum(Protocol):
    def __add__(self: S, other: S, /) -> S: ...


S = TypeVar("S", bound=_Sum)


@dataclass(frozen=True)
class Statistics:
    """What the images of a data set are scaled and normalised by; one number per channel.

    A run keeps them: it resumes with the same ones, and its weights are evaluated with them.
    """

    scale: str  # dtype, percentile or none: how stored numbers become the scaled ones
    dtype: str  # of the numbers in a batch before they are normalised: uint8, uint16, int16 or float32
    mean: tuple[float, ...]  # of the scaled numbers
    std: tuple[float, ...]
    low: tuple[float, ...]  # the 0.1 and 99.9 percentiles of the stored numbers
    high: tuple[float, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain types, for a checkpoint."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, found: object) -> Statistics:
        """What `to_dict` gave. Raises DataError for anything else."""
        try:
            if not isinstance(found, Mapping):
                raise TypeError("no mapping")
            mean, std, low, high = (tuple(map(float, found[name])) for name in ("mean", "std", "low", "high"))
            return cls(str(found["scale"]), np.dtype(found["dtype"]).name, mean, std, low, high)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"no statistics of images: {error!r}") from None


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of each channel.

    Merging is exact up to rounding: T. Chan, G. Golub, R. LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances" (1979), equation 2.1.
    """

    count: int
    mean: NDArray[np.float64]  # (channels,)
    squares: NDArray[np.float64]  # (channels,), sums of squared deviations from the mean

    @classmethod
    def none(cls, channels: int) -> Moments:
        """Of no pixels."""
        return cls(0, np.zeros(channels), np.zeros(channels))

    @classmethod
    def of(cls, pixels: NDArray) -> Moments:
        """Of one image, (H, W, channels)."""
        found = cls.none(pixels.shape[2])
        flat = pixels.reshape(-1, pixels.shape[2])
        for start in range(0, len(flat), _BLOCK):
            block = flat[start : start + _BLOCK].astype(np.float64)
            mean = block.mean(0)
            found = found + cls(len(block), mean, ((block - mean) ** 2).sum(0))
        return found

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        return Moments(count, mean, self.squares + other.squares + apart**2 * (self.count * other.count / count))

    @property
    def std(self) -> NDArray[np.float64]:
        """The population standard deviation of each channel (divided by the number of pixels), (channels,)."""
        return np.sqrt(self.squares / max(self.count, 1))


@dataclass
class Counts:
    """How often each number occurs in one channel.

    Integers of up to 16 bits and float16 are counted exactly; of other numbers the 16 leading binary digits are, so
    that a percentile is off by at most 1 in 65,000 of itself.
    """

    keys: NDArray[np.uint32]  # (n,) ascending; in the order of the numbers
    counts: NDArray[np.int64]  # (n,)

    @classmethod
    def none(cls) -> Counts:
        """Of no numbers."""
        return cls(np.zeros(0, np.uint32), np.zeros(0, np.int64))

    @classmethod
    def of(cls, numbers: NDArray) -> Counts:
        """Of one channel of an image, of any shape."""
        if numbers.dtype.itemsize <= 2 and numbers.dtype.kind in "ui":
            lowest = np.iinfo(numbers.dtype).min
            return cls.of_table(np.bincount(numbers.ravel().astype(np.int64) - lowest), lowest)
        return cls(*np.unique(_keys(numbers.ravel().astype(np.float32)), return_counts=True))

    @classmethod
    def of_table(cls, every: NDArray[np.int64], lowest: int) -> Counts:
        """From a histogram `every`, (n,): how often lowest, lowest + 1, ... occur."""
        there = np.flatnonzero(every)
        return cls(_keys((there + lowest).astype(np.float32)), every[there])

    @property
    def numbers(self) -> NDArray[np.float64]:
        """The numbers that occur, (n,), ascending."""
        return _numbers(self.keys)

    def __add__(self, other: Counts) -> Counts:
        keys, places = np.unique(np.concatenate((self.keys, other.keys)), return_inverse=True)
        counts = np.zeros(len(keys), np.int64)
        np.add.at(counts, places, np.concatenate((self.counts, other.counts)))
        return Counts(keys, counts)

    def percentile(self, share: float) -> float:
        """The number below which this share of all lies, interpolated linearly, as `numpy.percentile` does."""
        ends = np.cumsum(self.counts)
        rank = share * (ends[-1] - 1)
        below, above = (
            _numbers(self.keys[np.searchsorted(ends, r, side="right")]) for r in (np.floor(rank), np.ceil(rank))
        )
        return float(below + (above - below) * (rank - np.floor(rank)))


@dataclass
class Measured:
    """Moments and counts of some images; those of several images, or of parts of a conversion, are added."""

    moments: Moments
    counts: list[Counts]  # one per channel

    @classmethod
    def none(cls, channels: int) -> Measured:
        """Of no images."""
        return cls(Moments.none(channels), [Counts.none()] * channels)

    @classmethod
    def of(cls, pixels: NDArray) -> Measured:
        """Of one image, (H, W, channels)."""
        return cls(Moments.of(pixels), [Counts.of(pixels[:, :, i]) for i in range(pixels.shape[2])])

    def __add__(self, other: Measured) -> Measured:
        counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        return Measured(self.moments + other.moments, counts)

    def percentile(self, share: float) -> tuple[float, ...]:
        """Of each channel."""
        return tuple(counts.percentile(share) for counts in self.counts)


def clipped(counts: list[Counts], low: tuple[float, ...], high: tuple[float, ...]) -> Moments:
    """The moments after `--scale percentile`, which maps `low` and below to 0, `high` and above to 1."""
    means, squares = [], []
    for channel, least, most in zip(counts, low, high, strict=True):
        numbers = (channel.numbers.clip(least, most) - least) / (most - least if most > least else 1.0)
        means.append(mean := np.average(numbers, weights=channel.counts))
        squares.append(((numbers - mean) ** 2 * channel.counts).sum())
    return Moments(int(counts[0].counts.sum()), np.array(means), np.array(squares))


def total(parts: Iterable[S]) -> S | None:
    """The sum of the parts in order, None of no parts; added pairwise, which keeps rounding errors small."""
    sums: list[tuple[int, S]] = []  # how many times a sum was doubled, and the sum
    for part in parts:
        level = 0
        while sums and sums[-1][0] == level:
            part, level = sums.pop()[1] + part, level + 1
        sums.append((level, part))
    whole = None
    for _, part in reversed(sums):
        whole = part if whole is None else part + whole
    return whole


def _keys(numbers: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Unsigned keys that sort as the numbers: rounded bits of a float32, all flipped if negative, else the sign."""
    bits = (numbers + np.float32(0)).view(np.uint32)  # -0 becomes 0
    half = np.uint32(1 << (_COARSE - 1))
    bits = (bits + half) >> np.uint32(_COARSE) << np.uint32(_COARSE)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _numbers(keys: NDArray[np.uint32]) -> NDArray[np.float64]:
    """The inverse of `_keys`, up to its rounding."""
    bits = np.where(keys & _SIGN, keys & ~_SIGN, ~keys)
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)
