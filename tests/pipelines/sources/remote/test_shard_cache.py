from __future__ import annotations

import hashlib
import os
import pickle
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from spark_fast.pipelines.sources.remote import shard_cache
from spark_fast.pipelines.sources.remote.server import DamagedError, StoppedError
from spark_fast.pipelines.sources.remote.shard_cache import ShardCache, check_arrived, default_folder
from spark_fast.pipelines.sources.shard_format import ShardFile
from tests.commands import HANG_SECONDS

CONTENTS = [bytes([k]) * 100 for k in range(6)]
FILES = [ShardFile(f"{k}.tar", 1, 100, hashlib.sha256(content).hexdigest()) for k, content in enumerate(CONTENTS)]


def bringing(k):
    return lambda path: path.write_bytes(CONTENTS[k])


def bring(cache, *numbers, keep=()):
    """Fetch these files, each used later than the one before."""
    for k in numbers:
        cache.fetch(FILES[k], bringing(k), keep=[FILES[j].sha256 for j in keep])
        used(cache, k)


def used(cache, k):
    used.clock += 10
    os.utime(cache.folder / FILES[k].sha256, (used.clock, used.clock))


used.clock = 1e9


def held(cache):
    return [k for k, file in enumerate(FILES) if cache.holds(file)]


def names(cache):
    return {path.name for path in cache.folder.iterdir()} - {"lock"}


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", 300)


def test_what_was_fetched_is_there_and_nothing_else(cache):
    bring(cache, 0, 1)
    with cache.open(FILES[1]) as file:
        assert file.read() == CONTENTS[1]
    assert names(cache) == {FILES[0].sha256, FILES[1].sha256}
    cache.fetch(FILES[1], lambda path: pytest.fail("it is here"))
    with pytest.raises(FileNotFoundError):
        cache.open(FILES[2])


def test_the_least_recently_used_make_room(cache):
    bring(cache, 0, 1, 2)
    used(cache, 0)
    bring(cache, 3)
    assert held(cache) == [0, 2, 3]
    bring(cache, 4, keep=[2])
    assert held(cache) == [2, 3, 4], "although 2 was used the longest time ago"
    bring(cache, 5, keep=[2, 3, 4])
    assert len(held(cache)) == 3, "what should be kept goes if there is nothing else"


def test_to_read_a_file_is_to_use_it(cache):
    bring(cache, 0, 1, 2)
    cache.open(FILES[0]).close()
    bring(cache, 3)
    assert held(cache) == [0, 2, 3]


def test_a_file_that_was_opened_can_be_read_after_it_was_removed(cache):
    bring(cache, 0)
    with cache.open(FILES[0]) as file:
        used(cache, 0)
        bring(cache, 1, 2, 3)
        assert held(cache) == [1, 2, 3]
        assert file.read() == CONTENTS[0]


def test_a_download_that_fails_leaves_nothing(cache):
    def half(path):
        path.write_bytes(b"half")
        raise DamagedError("half")

    with pytest.raises(DamagedError, match="half"):
        cache.fetch(FILES[0], half)
    assert names(cache) == set()


def test_a_cut_file_is_fetched_again_and_a_damaged_one_found(cache):
    bring(cache, 0, 1)
    (cache.folder / FILES[0].sha256).write_bytes(b"cut")
    with pytest.raises(FileNotFoundError):
        cache.open(FILES[0])
    bring(cache, 0)
    assert not cache.drop_damaged(FILES[0])
    (cache.folder / FILES[1].sha256).write_bytes(CONTENTS[2])
    assert cache.drop_damaged(FILES[1])
    assert held(cache) == [0]


@pytest.mark.parametrize("threads_share_a_cache", [True, False])
def test_many_who_need_a_file_fetch_it_once(tmp_path, threads_share_a_cache):
    """Two objects stand for two processes: a lock on a file is the opened file's, not the process's."""
    caches = [ShardCache(tmp_path, 300)] * 4 if threads_share_a_cache else [ShardCache(tmp_path, 300) for _ in range(4)]
    count, begun, may_end = [], threading.Event(), threading.Event()

    def slowly(path):
        count.append(1)
        path.write_bytes(CONTENTS[0][:50])
        begun.set()
        assert may_end.wait(HANG_SECONDS)
        path.write_bytes(CONTENTS[0])

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(caches[0].fetch, FILES[0], slowly)
        assert begun.wait(HANG_SECONDS)
        others = [pool.submit(cache.fetch, FILES[0], slowly) for cache in caches[1:]]
        assert not caches[1].holds(FILES[0]), "a file under way is not there"
        may_end.set()
        for future in (first, *others):
            future.result(HANG_SECONDS)
    assert len(count) == 1
    assert names(caches[0]) == {FILES[0].sha256}


def test_what_is_under_way_counts_in_full_and_is_waited_for(tmp_path):
    one, other = ShardCache(tmp_path, 150), ShardCache(tmp_path, 150)
    begun, may_end, ended = threading.Event(), threading.Event(), []

    def slowly(path):
        begun.set()
        assert may_end.wait(HANG_SECONDS)
        path.write_bytes(CONTENTS[0])
        ended.append(0)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(one.fetch, FILES[0], slowly)
        assert begun.wait(HANG_SECONDS)
        assert not other._has_room(tmp_path / "x", 100, ())
        second = pool.submit(other.fetch, FILES[1], lambda path: ended.append(path.write_bytes(CONTENTS[1])))
        may_end.set()
        first.result(HANG_SECONDS)
        second.result(HANG_SECONDS)
    assert ended == [0, 100]
    assert held(one) == [1], "both do not fit"


def test_all_threads_that_wait_for_a_file_hear_of_its_failure(cache, monkeypatch):
    class Heard(Future):
        asked = threading.Event()

        def result(self, timeout=None):
            self.asked.set()
            return super().result(timeout)

    monkeypatch.setattr(shard_cache, "Future", Heard)
    begun = threading.Event()

    def fail(path):
        begun.set()
        assert Heard.asked.wait(HANG_SECONDS)
        raise DamagedError("no")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.fetch, FILES[0], fail)
        assert begun.wait(HANG_SECONDS)
        waiting = pool.submit(cache.fetch, FILES[0], lambda path: pytest.fail("not a second time"))
        for future in (first, waiting):
            with pytest.raises(DamagedError):
                future.result(HANG_SECONDS)
    bring(cache, 0)
    assert held(cache) == [0]


def test_what_a_killed_process_left_is_removed(cache):
    bring(cache, 0)
    left = cache.folder / f"{FILES[1].sha256}.250.partial"
    left.write_bytes(b"half")
    (cache.folder / f"{FILES[1].sha256}.claim").touch()
    bring(cache, 2)
    assert names(cache) == {FILES[0].sha256, FILES[2].sha256}, "and its 250 bytes did not count"


def test_a_stop_ends_the_wait_for_another_process(tmp_path):
    one, other = ShardCache(tmp_path, 300), ShardCache(tmp_path, 300)
    stop = threading.Event()

    def meanwhile(path):
        stop.set()
        with pytest.raises(StoppedError):
            other.fetch(FILES[0], bringing(0), stop=stop)
        path.write_bytes(CONTENTS[0])

    one.fetch(FILES[0], meanwhile)
    assert held(one) == [0]


def test_room_is_made_on_a_full_disk(cache):
    bring(cache, 0, 1)
    assert cache.make_room([FILES[0].sha256])
    assert held(cache) == [0]
    assert not cache.make_room([FILES[0].sha256]), "what is needed next stays"


@pytest.mark.parametrize(
    ("content", "said"), [(b"x" * 99, "99 bytes arrived, but the manifest says 100"), (b"x" * 100, "sha256")]
)
def test_what_arrives_is_compared_with_the_manifest(tmp_path, content, said):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DamagedError, match=said):
        check_arrived(FILES[0], tmp_path / "a")
    (tmp_path / "a").write_bytes(CONTENTS[0])
    check_arrived(FILES[0], tmp_path / "a")


def test_it_may_be_sent_to_another_process(cache):
    bring(cache, 0)
    there = pickle.loads(pickle.dumps(cache))
    assert (there.folder, there.size, held(there)) == (cache.folder, 300, [0])


def test_the_default_is_the_users_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert default_folder() == Path("/fast/spark_fast/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache/spark_fast/shards"
