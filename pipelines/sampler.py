"""Which samples make up a batch, and the random numbers of each sample: pure functions, no state.

Numbers come from a counter-based generator: a hash of (seed, epoch, sample, draw). Nothing is consumed
in sequence, so a sample's crop depends on no other sample, on no worker and on no rank, and nothing has
to be replayed to start in the middle. The hash is splitmix64 (Steele, Lea, Flood: "Fast splittable
pseudorandom number generators", OOPSLA 2014), written out here because numpy's own generators may change
their streams between versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ORDER, _SAMPLE, _SHARD = 1, 2, 3  # first word of each hash: keeps the uses of a seed independent


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's output function; a bijection of words. Arrays only: scalars warn on overflow."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(*words: ArrayLike) -> NDArray[np.uint64]:
    """Hash of a tuple of integers, or of arrays of them, word by word; shape (n,)."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = _mix(state ^ np.atleast_1d(np.asarray(word, dtype=np.int64)).view(np.uint64))
    return state


def order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of range(num_samples) in which an epoch reads its samples; shape (num_samples,)."""
    keys = _hash(_ORDER, seed, epoch, np.arange(num_samples))
    return np.argsort(keys, kind="stable")


def block_order(shards: NDArray[np.integer], block: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of the samples that reads `block` shards at a time; shape (n,).

    The shards are shuffled and cut into blocks; the samples of a block are shuffled among each other. With a block
    of all shards it is `order`.

    Args:
        shards: number of the shard that holds each sample, (n,).
    """
    keys = _hash(_SHARD, seed, epoch, np.arange(int(shards.max(initial=0)) + 1))
    place = np.argsort(np.argsort(keys, kind="stable"), kind="stable")  # of each shard among the shuffled ones
    return np.lexsort((_hash(_ORDER, seed, epoch, np.arange(len(shards))), place[shards] // block))


def _positions(num_samples: int, step: int, batch_size: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """Where in an epoch's sequence a rank's contiguous share of the batch at `step` lies; (n,)."""
    start = step * batch_size
    batch = min(batch_size, num_samples - start)
    return np.arange(start + rank * batch // world_size, start + (rank + 1) * batch // world_size)


def uniform(seed: int, draw_ids: ArrayLike, sample_ids: ArrayLike, n: int) -> NDArray[np.float64]:
    """n numbers in [0, 1) per sample, (samples, n), a function of seed, draw and sample alone.

    `draw_ids`: one for all samples, or one per sample; the epoch, unless samples are repeated in it (see `Share`).
    """
    keys = _hash(_SAMPLE, seed, draw_ids, sample_ids)
    counters = np.arange(n, dtype=np.uint64) * _GOLDEN
    words = _mix(keys[:, None] + counters)  # (samples, 1) + (n,) -> (samples, n)
    return (words >> np.uint64(11)) * 2.0**-53  # the upper 53 bits: every double of that spacing, never 1


class Share(NamedTuple):
    """What one rank reads at one step."""

    ids: NDArray[np.int64]  # (n,) samples
    draw_ids: NDArray[np.int64]  # (n,) which augmentation draw of each: epoch * repeats + copy


@dataclass(frozen=True)
class Sampler:
    """Which samples one rank reads at which step; `batch_size` is the global one."""

    num_samples: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    repeats: int = 1  # augmentation draws of a sample in an epoch, which then has so many fewer samples
    in_order: bool = False  # every sample once, as they are listed: no batch is dropped
    block: int = 0  # shards whose samples are shuffled with each other, see `block_order`; 0: all samples are
    shards: NDArray[np.integer] | None = field(default=None, repr=False, compare=False)  # of each sample, for `block`

    def __len__(self) -> int:
        """Steps per epoch; an incomplete last batch is dropped, unless `in_order`."""
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + (self.in_order and rest > 0)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Share]:
        """The rank's shares, batch_size / world_size samples each, of the steps from start_step on.

        An incomplete batch is shared as equally as it can be; a rank that gets nothing of it ends a step earlier.

        Raises:
            ValueError: a start_step outside the epoch.
        """
        if not 0 <= start_step <= len(self):
            raise ValueError(f"start_step {start_step} lies outside an epoch of {len(self)} steps")
        permutation = self.permutation(epoch)
        steps = range(start_step, len(self))
        shares = (_positions(self.num_samples, k, self.batch_size, self.rank, self.world_size) for k in steps)
        return (self._share(permutation, epoch, positions) for positions in shares if len(positions))

    def permutation(self, epoch: int) -> NDArray[np.int64] | None:
        """The samples in the order of an epoch, (num_samples,); None: as they are listed."""
        if self.in_order:
            return None
        if self.block and self.shards is not None:
            return block_order(self.shards, self.block, self.seed, epoch)
        return order(self.num_samples, self.seed, epoch)

    def _share(self, permutation: NDArray[np.int64] | None, epoch: int, positions: NDArray[np.int64]) -> Share:
        ids = positions if permutation is None else permutation[positions // self.repeats]
        return Share(ids, epoch * self.repeats + positions % self.repeats)
