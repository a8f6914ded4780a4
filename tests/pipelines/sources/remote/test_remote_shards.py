from __future__ import annotations

import errno
import logging
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch

from spark_fast.errors import DataError, ImageError, SettingsError
from spark_fast.pipelines.sources.remote import prefetch, remote_shards, server
from spark_fast.pipelines.sources.remote.remote_shards import RemoteShardSource, has_split
from spark_fast.pipelines.sources.remote.shard_cache import ShardCache
from spark_fast.pipelines.sources.shard_format import MANIFEST
from spark_fast.pipelines.sources.shards import ShardSource
from tests.pipelines.building import build
from tests.pipelines.comparing import same
from tests.pipelines.sources.remote.faulty_server import FAULTS
from tests.pipelines.sources.ten_images import JPEGS, LABELS, write_all

PLENTY = 10**9


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", PLENTY)


@pytest.fixture
def _impatient(monkeypatch):
    """Silent servers are given up at once."""
    monkeypatch.setattr(server, "SILENT_SECONDS", 0.2)


def left_behind(cache):
    return sorted(path.name for path in cache.folder.iterdir() if path.suffix)


def read_all(source):
    return [bytes(source.read(i)) for i in range(len(source))]


def test_it_is_what_the_shards_are_on_a_disk(in_memory, shards, cache):
    local, remote = ShardSource(shards), RemoteShardSource(in_memory, "train", cache)
    assert read_all(remote) == JPEGS
    assert remote.labels.tolist() == LABELS
    assert (remote.classes, remote.fingerprint()) == (local.classes, local.fingerprint())
    assert [remote.name(i) for i in range(10)] == [local.name(i) for i in range(10)]
    local.close()


def test_a_shard_is_fetched_when_an_image_of_it_is_read(in_memory, cache):
    source = RemoteShardSource(in_memory, "train", cache)
    assert source.name(7) == "shard-000000.tar, byte 512"
    source.read(7)
    assert [cache.holds(shard) for shard in source.files] == [True, False, False]
    assert source.name(7) == "shard-000000.tar:00000007-p_7.jpg"


def test_the_second_time_nothing_but_the_manifest_is_asked_for(over_http, cache):
    read_all(RemoteShardSource(over_http.url, "train", cache))
    assert over_http.asked == {MANIFEST: 1, "index.npy": 1, **{f"shard-00000{k}.tar": 1 for k in range(3)}}
    read_all(RemoteShardSource(over_http.url, "train", cache))
    assert over_http.asked.total() == 6


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_survived_and_nothing_is_left_of_it(over_http, cache, fault):
    over_http.faults = {name: [fault] for name in (MANIFEST, "index.npy", "shard-000001.tar")}
    assert read_all(RemoteShardSource(over_http.url, "train", cache)) == JPEGS
    assert over_http.met[fault] == 3
    assert left_behind(cache) == []


@pytest.mark.usefixtures("_impatient")
def test_twenty_faults_while_a_pipeline_reads_change_no_batch(over_http, shards, tmp_path):
    local = build(shards, batch_size=3, input_size=32, shuffle_block=1)
    expected = [batch for epoch in range(2) for batch in local.epoch(epoch)]
    kinds = [fault for fault in FAULTS if fault not in ("404", "403")] * 2 + ["404", "403"]
    over_http.faults = {MANIFEST: kinds[:2], "index.npy": kinds[2:5]}
    over_http.faults |= {f"shard-00000{k}.tar": kinds[5 + 5 * k : 10 + 5 * k] for k in range(3)}
    cache_dir = str(tmp_path / "cache")
    remote = build(over_http.url, batch_size=3, input_size=32, shuffle_block=1, cache_dir=cache_dir, cache_size="56kB")
    found = [batch for epoch in range(2) for batch in remote.epoch(epoch)]
    assert sum(over_http.met[fault] for fault in FAULTS) == 20
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.ids.tolist() == b.ids.tolist()
    assert remote.bad_images.substituted == 0
    local.close()
    remote.close()
    for thread in threading.enumerate():
        if thread.name.startswith("fetch-"):  # for the epoch that would come next; on a busy machine it ends later
            thread.join()
    assert left_behind(ShardCache(Path(cache_dir), 0)) == []


@pytest.mark.slow
def test_worker_processes_download_by_themselves(over_http, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(prefetch, "DOWNLOADS", 0)  # else the trainer's process may be quicker
    options = {"batch_size": 3, "input_size": 32, "shuffle_block": 1, "prefetch": 1}
    local = build(shards, **options)
    remote = build(over_http.url, **options, workers=2, worker_processes=2, cache_dir=str(tmp_path / "cache"))
    assert same(list(local.epoch(0)), list(remote.epoch(0)))
    local.close()
    remote.close()


@pytest.mark.slow
def test_worker_processes_share_the_cache_and_give_the_same_batches(over_http, shards, tmp_path):
    options = {"batch_size": 3, "input_size": 32, "shuffle_block": 1}
    local = build(shards, **options)
    remote = build(
        over_http.url, **options, workers=2, worker_processes=2, cache_dir=str(tmp_path / "cache"), cache_size="56kB"
    )
    for epoch in range(2):
        assert same(list(local.epoch(epoch)), list(remote.epoch(epoch)))
    local.close()
    remote.close()


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(("fault", "said"), [
    ("500", "9 attempts: ClientResponseError: 500"), ("404", "3 attempts: the server has no such file"),
    ("truncated", "9 attempts: ClientPayloadError"), ("short", r"9 attempts: DamagedError: \d+ bytes arrived"),
    ("wrong", "9 attempts: DamagedError: its sha256 differs"), ("reset", "9 attempts: "),
])  # fmt: skip
def test_a_server_that_never_delivers_is_named(over_http, cache, fault, said):
    source = RemoteShardSource(over_http.url, "train", cache)
    over_http.always = fault
    with pytest.raises(DataError, match=rf"{over_http.url}/shard-000000.tar cannot be read after {said}"):
        source.read(7)
    assert left_behind(cache) == []


def test_a_server_that_is_not_there_is_named(over_http, cache):
    port = over_http.server_address[1]
    over_http.shutdown()
    over_http.server_close()
    with pytest.raises(
        DataError, match=rf"127.0.0.1:{port}/{MANIFEST} cannot be read after 9 attempts: ClientConnector"
    ):
        RemoteShardSource(over_http.url, "train", cache)


def test_splits_are_folders_of_their_names(tmp_path, cache):
    pytest.importorskip("fsspec")
    (tmp_path / "data").mkdir()
    write_all(tmp_path / "data" / "train")
    write_all(tmp_path / "data" / "val", labelled=False)
    url = f"file://{tmp_path}/data"
    assert RemoteShardSource(url, "train", cache).labels is not None
    assert RemoteShardSource(f"{url}/train/", "train", cache).labels is not None
    assert RemoteShardSource(url, "val", cache).labels is None
    assert RemoteShardSource(f"{url}/val", "all", cache).labels is None
    assert has_split(url, "val")
    assert not has_split(url, "test")
    with pytest.raises(DataError, match=rf"with {MANIFEST}; searched in {url}/test$"):
        RemoteShardSource(url, "test", cache)
    with pytest.raises(DataError, match=f"searched in {url}/no and {url}/no/train$"):
        RemoteShardSource(f"{url}/no", "train", cache)


def test_a_damaged_manifest_is_no_data(in_memory, shards, cache):
    files = pytest.importorskip("fsspec").filesystem("memory")
    text = (shards / MANIFEST).read_bytes()
    files.pipe_file(f"/{shards}/{MANIFEST}", text.replace(b'"count": 10', b'"count": 11'))
    with pytest.raises(DataError, match=f"{MANIFEST} is damaged: its own checksum differs"):
        RemoteShardSource(in_memory, "train", cache)


def test_a_shard_that_was_damaged_in_the_cache_is_fetched_again(in_memory, cache, caplog):
    source = RemoteShardSource(in_memory, "train", cache)
    read_all(source)
    with (cache.folder / source.files[0].sha256).open("r+b") as file:
        file.seek(600)
        file.write(b"\0" * 16)
    assert read_all(source) == JPEGS
    assert "shard-000000.tar in the cache" in caplog.text


def test_a_record_that_the_index_does_not_promise_is_one_bad_image(in_memory, cache):
    source = RemoteShardSource(in_memory, "train", cache)
    source._index["crc"][4] ^= 1
    with pytest.raises(ImageError, match="checksum differs"):
        source.read(4)
    assert source.read(2) == JPEGS[2]


def test_a_full_disk_makes_room_and_is_named_if_that_does_not_help(in_memory, cache, monkeypatch):
    source = RemoteShardSource(in_memory, "train", cache)
    source.read(7)
    download, full = server.Server.download, [3]

    def on_a_full_disk(self, name, size, path, stop, tell):
        download(self, name, size, path, stop, tell)
        full[0] -= 1
        if full[0] >= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(server.Server, "download", on_a_full_disk)
    assert source.read(0) == JPEGS[0]
    assert not cache.holds(source.files[0]), "what was there has made room"
    full[0] = 99
    with pytest.raises(DataError, match=f"after 9 attempts: OSError: .* the disk of the cache {cache.folder} is full"):
        source.read(8)
    assert left_behind(cache) == []


def test_a_cache_that_cannot_be_written_is_named(in_memory, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match=f"the cache {tmp_path / 'cache'} cannot be used: .*Not a directory"):
        RemoteShardSource(in_memory, "train", ShardCache(tmp_path / "cache", PLENTY))


def test_a_source_that_is_closed_stops_its_downloads(over_http, cache):
    source = RemoteShardSource(over_http.url, "train", cache)
    over_http.faults = {"shard-000000.tar": ["500"]}
    source.close()
    with pytest.raises(DataError, match=r"was closed while shard-000000.tar was being fetched"):
        source.read(7)


def test_a_download_that_another_thread_gave_up_is_begun_anew(in_memory, cache):
    source = RemoteShardSource(in_memory, "train", cache)
    stop = threading.Event()
    stop.set()
    with pytest.raises(server.StoppedError):
        source.fetch(source.files[0], stop)
    assert source.read(7) == JPEGS[7]


def test_it_may_be_sent_to_another_process_and_shares_the_cache(in_memory, cache):
    source = RemoteShardSource(in_memory, "train", cache)
    read_all(source)
    there = pickle.loads(pickle.dumps(source))
    pytest.importorskip("fsspec").filesystem("memory").rm(
        f"/{source.folder.removeprefix('memory://')}/shard-000000.tar"
    )
    assert read_all(there) == JPEGS
    assert there.labels.tolist() == LABELS


def test_the_log_says_what_is_read_and_how_the_first_downloads_go(in_memory, cache, caplog, monkeypatch):
    monkeypatch.setattr(remote_shards, "TELL_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "spark_fast.pipelines"):
        read_all(RemoteShardSource(in_memory, "train", cache))
    said = caplog.text
    assert f"{in_memory}: 10 images in 3 shards, 0.0512 MB; at most 1.0 GB of them in {cache.folder}" in said
    assert "shard-000000.tar: 100 % of 0.02048 MB" in said
    assert "fetched shard-000000.tar, 0.02048 MB at " in said


def test_what_is_no_photograph_or_needs_a_disk_is_refused(in_memory, tmp_path):
    with pytest.raises(SettingsError, match=rf"pipeline ffcv reads a .beton on a disk, not {in_memory}"):
        build(in_memory, batch_size=2, pipeline="ffcv", cache_dir=str(tmp_path / "cache"))
