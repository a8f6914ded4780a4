"""Shards are fetched in the order in which an epoch first needs them, as far ahead as the cache has room.

The order is known: it is that of (seed, epoch). Of each shard it is known where it is needed first and last. So the
next one may be fetched when it fits into the cache together with all those before it that are still needed. After an
epoch's last shard come the next epoch's first.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import DataError, SettingsError
from spark_fast.pipelines.sampler import Sampler, Share
from spark_fast.pipelines.sources.remote.remote_shards import RemoteShardSource, in_gb
from spark_fast.pipelines.sources.remote.server import StoppedError

logger = logging.getLogger("spark_fast.pipelines")

DOWNLOADS = 4  # at once
JOIN_SECONDS = 2.0  # for which closing waits for a download to notice


class Plan(NamedTuple):
    """What an epoch needs of the shards, in the order of their first use; each (m,) int64."""

    shards: NDArray[np.int64]
    first: NDArray[np.int64]  # position in the epoch's sequence of samples at which a shard is needed first
    last: NDArray[np.int64]  # and last


def plan(sequence: NDArray[np.integer], start: int = 0) -> Plan:
    """The plan for samples that lie in these shards, (n,), from position `start` on."""
    rest = sequence[start:]
    shards, first = np.unique(rest, return_index=True)
    last = len(rest) - 1 - np.unique(rest[::-1], return_index=True)[1]
    by_use = np.argsort(first)
    return Plan(shards[by_use].astype(np.int64), first[by_use] + start, last[by_use] + start)


def plan_from(sampler: Sampler, shards: NDArray[np.integer], epoch: int, start_step: int) -> Plan:
    """The plan for an epoch from `start_step` on, and for the next one, whose positions continue those of this one.

    `shards`, (n,), is the shard of each sample.
    """
    used = min(len(sampler) * sampler.batch_size, sampler.num_samples)
    used = -(-used // sampler.repeats)

    def sequence(number: int) -> NDArray[np.integer]:
        permutation = sampler.permutation(number)
        return (shards if permutation is None else shards[permutation])[:used]

    now = plan(sequence(epoch), start_step * sampler.batch_size // sampler.repeats)
    if sampler.in_order:  # an evaluation: there may be no other epoch
        return now
    then = plan(sequence(epoch + 1))
    return Plan(
        *(
            np.concatenate([a, b])
            for a, b in zip(now, then._replace(first=then.first + used, last=then.last + used), strict=True)
        )
    )


class ShardPrefetch:
    """Fetches the shards of one plan after the other."""

    def __init__(self, source: RemoteShardSource) -> None:
        self._source = source
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        source.on_close.append(self.stop)

    def follow(self, coming: Plan) -> None:
        """Fetch for this plan instead of the one before."""
        self.stop()
        self._stop = threading.Event()
        self._plan, self._next, self._oldest = coming, 0, int(coming.first.min(initial=0))
        self._sizes = np.array([self._source.files[shard].bytes for shard in coming.shards.tolist()], np.int64)
        self._threads = [
            threading.Thread(target=self._work, args=(self._stop,), name=f"fetch-{i}", daemon=True)
            for i in range(DOWNLOADS)
        ]
        for thread in self._threads:
            thread.start()

    def used_until(self, position: int) -> None:
        """No sample before this position will be read any more."""
        with self._changed:
            self._oldest = position
            self._changed.notify_all()

    def stop(self) -> None:
        """Give up what is being fetched."""
        with self._changed:
            self._stop.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
        self._threads = []

    def _work(self, stop: threading.Event) -> None:
        with suppress(StoppedError):
            while (shard := self._take(stop)) is not None:
                self._fetch(shard, stop)

    def _fetch(self, shard: int, stop: threading.Event) -> None:
        try:
            self._source.fetch(self._source.files[shard], stop)
        except DataError as error:
            logger.warning("%s; it is requested again when one of its images is needed", error)

    def _take(self, stop: threading.Event) -> int | None:
        """The next shard, once there is room for it; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: stop.is_set() or self._next == len(self._plan.shards) or self._fits())
            if stop.is_set() or self._next == len(self._plan.shards):
                return None
            self._next += 1
            needed = self._needed()
            files = self._source.files
            self._source.window = frozenset(files[i].sha256 for i in self._plan.shards[needed].tolist())
            return int(self._plan.shards[self._next - 1])

    def _needed(self) -> NDArray[np.intp]:
        """Which of the plan's shards, of those that were begun, are needed yet."""
        return np.flatnonzero(self._plan.last[: self._next] >= self._oldest)

    def _fits(self) -> bool:
        taken = self._sizes[self._needed()].sum() + self._sizes[self._next]
        return bool(taken <= self._source.cache.size)


@dataclass(frozen=True)
class PrefetchingSampler(Sampler):
    """The same samples; while they are drawn, their shards are fetched ahead."""

    prefetch: ShardPrefetch | None = None
    held: int = 0  # steps that may still be read when the next one is drawn

    @classmethod
    def of(cls, sampler: Sampler, source: RemoteShardSource, held: int) -> PrefetchingSampler:
        """As `sampler`, over the images of this source."""
        same = {field.name: getattr(sampler, field.name) for field in fields(sampler)}
        return cls(**same | {"shards": source.shards()}, prefetch=ShardPrefetch(source), held=held)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Share]:
        """As of a Sampler."""
        shares = super().epoch(epoch, start_step)
        assert self.prefetch is not None
        assert self.shards is not None
        self.prefetch.follow(plan_from(self, self.shards, epoch, start_step))
        return self._watched(shares, start_step)

    def _watched(self, shares: Iterator[Share], start_step: int) -> Iterator[Share]:
        assert self.prefetch is not None
        try:
            for step, share in enumerate(shares, start_step):
                self.prefetch.used_until(max(step - self.held, 0) * self.batch_size // self.repeats)
                yield share
        except GeneratorExit:
            self.prefetch.stop()
            raise


def check_cache(source: RemoteShardSource, sampler: Sampler, prefetch: int) -> None:
    """Raise SettingsError where the cache cannot hold what is needed at a time: each image would cost a download."""
    needed, size, count = _needed(source, sampler, prefetch), source.cache.size, len(source.files)
    if needed <= size:
        return
    more = f"use --cache_size {-(-needed // 10**6)}MB or more"
    what = f"{source.folder} has {count} shards, {in_gb(source.total_bytes)}, and --cache_size is {in_gb(size)}"
    if sampler.in_order:
        raise SettingsError(f"{what}: images are read in the order of their listing, from all shards at once: {more}")
    fitting = [n for n in range(1, count) if _needed(source, sampler, prefetch, n) <= size]
    block = f", or --shuffle_block {fitting[-1]} (docs/how_to/remote.md says what it changes)" if fitting else ""
    if sampler.block:
        raise SettingsError(f"{what}: blocks of {sampler.block} shards need {in_gb(needed)}: {more}{block}")
    raise SettingsError(f"{what}: a shuffle of all images reads from all shards at once: {more}{block}")


def _needed(source: RemoteShardSource, sampler: Sampler, prefetch: int, block: int | None = None) -> int:
    """Bytes of the shards that the batches in preparation and the next block may be in."""
    block = sampler.block if block is None else block
    if sampler.in_order or not block:
        return source.total_bytes
    images = sampler.batch_size * (prefetch + 2) / sampler.repeats
    blocks = 1 + int(np.ceil(images / (block * len(source) / len(source.files))))
    largest = sorted((shard.bytes for shard in source.files), reverse=True)
    return sum(largest[: block * blocks])
