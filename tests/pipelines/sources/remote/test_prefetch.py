from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_fast.errors import SettingsError
from spark_fast.pipelines.sampler import Sampler
from spark_fast.pipelines.sources.remote.prefetch import (
    PrefetchingSampler,
    ShardPrefetch,
    check_cache,
    plan,
    plan_from,
)
from spark_fast.pipelines.sources.remote.remote_shards import RemoteShardSource
from spark_fast.pipelines.sources.remote.server import Server
from spark_fast.pipelines.sources.remote.shard_cache import ShardCache
from tests.commands import HANG_SECONDS
from tests.pipelines.sources.ten_images import JPEGS


def as_lists(found):
    return [part.tolist() for part in found]


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(0, 60))
def test_a_plan_says_where_each_shard_is_needed_first_and_last(sequence, start):
    shards, first, last = as_lists(plan(np.array(sequence, dtype=np.uint32), start))
    rest = sequence[start:]
    assert shards == list(dict.fromkeys(rest)), "in the order of their first use"
    assert first == [start + rest.index(shard) for shard in shards]
    assert last == [len(sequence) - 1 - sequence[::-1].index(shard) for shard in shards]


def test_the_next_epoch_follows_the_rest_of_this_one():
    shards = np.array([0, 0, 1, 1, 2, 2, 3])
    sampler = Sampler(7, 2, seed=5, block=1, shards=shards)
    orders = [shards[sampler.permutation(epoch)][:6].tolist() for epoch in (3, 4)]  # an incomplete batch is dropped
    found, first, last = as_lists(plan_from(sampler, shards, 3, start_step=1))
    now, then = list(dict.fromkeys(orders[0][2:])), list(dict.fromkeys(orders[1]))
    assert found == now + then
    assert first == [orders[0].index(s, 2) for s in now] + [6 + orders[1].index(s) for s in then]
    assert last[-1] == 11


def test_an_evaluation_has_one_epoch_in_the_order_of_the_listing():
    shards = np.array([2, 0, 1, 1])
    assert as_lists(plan_from(Sampler(4, 3, in_order=True), shards, 0, 0)) == [[2, 0, 1], [0, 1, 2], [0, 1, 3]]


def test_repeats_read_fewer_samples():
    shards = np.arange(8)
    sampler = Sampler(8, 2, seed=1, repeats=4)
    now = shards[sampler.permutation(0)][:2].tolist()
    assert as_lists(plan_from(sampler, shards, 0, 2))[0][:1] == now[1:], "step 2 is at the second sample"


def wait_for(condition: Callable[[], object]) -> None:
    """Let the threads come so far; a guard alone looks at the clock."""
    end = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def source(in_memory, tmp_path):
    """Of three shards of 20480, 10240 and 20480 bytes, with a cache for two of them."""
    found = RemoteShardSource(in_memory, "train", ShardCache(tmp_path / "cache", 36_000))
    yield found
    found.close()


def held(source):
    return [k for k, shard in enumerate(source.files) if source.cache.holds(shard)]


def test_shards_are_fetched_as_far_ahead_as_the_cache_has_room(source):
    prefetch = ShardPrefetch(source)
    prefetch.follow(plan(np.array([2, 2, 1, 1, 0, 0])))
    wait_for(lambda: held(source) == [1, 2])
    prefetch.used_until(1)
    assert prefetch._next == 2, "the third would push out what is needed yet"
    prefetch.used_until(2)
    wait_for(lambda: held(source) == [0, 1])
    prefetch.stop()


def test_a_plan_replaces_the_one_before_and_stop_ends_all(source, monkeypatch):
    begun, asked = threading.Event(), []

    def download(self, name, size, path, stop, tell):
        asked.append(name)
        begun.set()
        assert stop.wait(HANG_SECONDS)
        raise OSError("stopped")

    monkeypatch.setattr(Server, "download", download)
    prefetch = ShardPrefetch(source)
    prefetch.follow(plan(np.array([0])))
    assert begun.wait(HANG_SECONDS)
    before = prefetch._threads
    begun.clear()
    prefetch.follow(plan(np.array([1])))
    assert begun.wait(HANG_SECONDS)
    assert not any(thread.is_alive() for thread in before)
    before = prefetch._threads
    prefetch.stop()
    assert not any(thread.is_alive() for thread in before)
    assert asked == ["shard-000000.tar", "shard-000001.tar"]


def test_a_shard_that_cannot_be_had_is_left_to_the_one_who_needs_it(source, monkeypatch, caplog):
    failing = ["shard-000002.tar"]
    download = Server.download

    def fails(self, name, *more):
        if name in failing:
            raise OSError("gone")
        download(self, name, *more)

    monkeypatch.setattr(Server, "download", fails)
    prefetch = ShardPrefetch(source)
    prefetch.follow(plan(np.array([2, 1])))
    wait_for(lambda: held(source) == [1] and "it is requested again" in caplog.text)
    failing.clear()
    assert source.read(8) == JPEGS[8]
    prefetch.stop()


def test_drawing_samples_fetches_and_changes_none(source):
    source.cache.size = 41_000
    plain = Sampler(10, 2, seed=3, block=1, shards=source.shards())
    sampler = PrefetchingSampler.of(plain, source, held=1)
    for start in (0, 2):
        drawn = list(sampler.epoch(1, start))
        assert [share.ids.tolist() for share in drawn] == [share.ids.tolist() for share in plain.epoch(1, start)]
    assert sampler.prefetch is not None
    last = int(source.shards()[plain.permutation(1)[-1]])
    wait_for(lambda: last in held(source))
    assert sampler.prefetch._threads, "when all are drawn, the last batches' shards may still be on their way"
    abandoned = sampler.epoch(1)
    next(abandoned)
    abandoned.close()
    assert not sampler.prefetch._threads


def test_a_source_that_is_closed_leaves_no_thread(source):
    prefetch = ShardPrefetch(source)
    prefetch.follow(plan(np.array([2, 1, 0])))
    wait_for(lambda: held(source) == [1, 2])
    threads = prefetch._threads
    source.close()
    assert threads
    assert not any(thread.is_alive() for thread in threads)


def test_a_cache_that_would_be_read_in_circles_is_refused(source):
    """Shards of 20480, 10240 and 20480 bytes, a cache of 36000."""
    shards = source.shards()
    with pytest.raises(SettingsError, match=r"3 shards, 0.0512 MB, and --cache_size is 0.036 MB: a shuffle of all"):
        check_cache(source, Sampler(10, 2), 2)
    with pytest.raises(SettingsError, match="images are read in the order of their listing"):
        check_cache(source, Sampler(10, 2, in_order=True), 2)
    with pytest.raises(SettingsError, match=r"blocks of 1 shards need 0.04096 MB: use --cache_size 1MB or more$"):
        check_cache(source, Sampler(10, 1, block=1, shards=shards), 0)
    source.cache.size = 41_000
    check_cache(source, Sampler(10, 1, block=1, shards=shards), 0)
    with pytest.raises(SettingsError, match=r"or --shuffle_block 1 \(docs/how_to/remote.md"):
        check_cache(source, Sampler(10, 1), 0)
    with pytest.raises(SettingsError, match=r"blocks of 2 shards need .* or more, or --shuffle_block 1 \("):
        check_cache(source, Sampler(10, 1, block=2, shards=shards), 0)
    with pytest.raises(SettingsError, match=r"blocks of 1 shards need 0.0512 MB"):
        check_cache(source, Sampler(10, 2, block=1, shards=shards), 1)  # a batch and those ahead of it span two blocks
    source.cache.size = 51_200
    check_cache(source, Sampler(10, 2), 2)
    check_cache(source, Sampler(10, 2, in_order=True), 2)
