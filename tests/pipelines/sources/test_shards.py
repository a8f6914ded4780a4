from __future__ import annotations

import hashlib
import os
import pickle
import resource
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spark_fast.errors import DataError, ImageError
from spark_fast.pipelines.sampler import Sampler
from spark_fast.pipelines.sources.shard_format import (
    INDEX,
    INDEX_FILE,
    Manifest,
    ShardFile,
    write_manifest,
    write_shard,
)
from spark_fast.pipelines.sources.shards import ShardSource
from tests.pipelines.building import build
from tests.pipelines.sources.ten_images import JPEGS, LABELS, write_all


@pytest.mark.parametrize("labelled", [True, False])
def test_samples_come_back_in_the_order_of_the_listing(tmp_path, labelled):
    source = ShardSource(write_all(tmp_path, labelled))
    assert [source.read(i) for i in range(len(source))] == JPEGS
    assert (source.labels.tolist() == LABELS) if labelled else (source.labels is None)
    assert source.name(2) == "shard-000000.tar:00000002-p_2.jpg"
    source.close()


def test_a_copy_for_another_process_reads_the_same_and_opens_the_shards_itself(tmp_path):
    source = ShardSource(write_all(tmp_path))
    sent = pickle.dumps(source)
    source.close()
    copy = pickle.loads(sent)
    assert [copy.read(i) for i in range(len(copy))] == JPEGS
    assert (copy.labels.tolist(), copy.fingerprint()) == (LABELS, source.fingerprint())
    copy.close()
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"lists shard-000001.tar, which cannot be read"):
        pickle.loads(sent)


def test_a_shard_of_another_size_is_refused(tmp_path):
    write_all(tmp_path)
    with (tmp_path / "shard-000001.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"shard-000001.tar has \d+ bytes, manifest.json says \d+"):
        ShardSource(tmp_path)
    os.truncate(tmp_path / "shard-000001.tar", 4096)
    with pytest.raises(DataError, match=r"shard-000001.tar has 4096 bytes"):
        ShardSource(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    (write_all(tmp_path) / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"lists shard-000002.tar, which cannot be read: .*No such file"):
        ShardSource(tmp_path)


def test_a_shard_cut_short_while_in_use_is_an_error_not_a_crash(tmp_path):
    source = ShardSource(write_all(tmp_path))
    os.truncate(tmp_path / "shard-000000.tar", 700)
    with pytest.raises(ImageError, match=r"shard-000000.tar was truncated"):
        source.read(7)
    source.close()


def test_too_few_open_files_are_found_at_once(tmp_path):
    write_all(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        with pytest.raises(DataError, match=r"3 shards, .* may open only 200: run `ulimit -n 259`"):
            ShardSource(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_file_is_left_open(tmp_path):
    write_all(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        pipeline = build(tmp_path, batch_size=5, input_size=32)
        next(iter(pipeline.epoch(0)))
        pipeline.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_five_million_images_need_at_most_64_bytes_each(tmp_path):
    count = 5_000_000
    shard, _ = write_shard(tmp_path / "shard-000000.tar", [(0, "p.JPEG", 1, JPEGS[0])])
    rows = np.zeros(count, INDEX)
    rows["offset"], rows["size"], rows["label"] = 512, len(JPEGS[0]), np.arange(count) % 1000
    np.save(tmp_path / INDEX_FILE, rows)
    del rows
    content = (tmp_path / INDEX_FILE).read_bytes()
    index = ShardFile(INDEX_FILE, 0, len(content), hashlib.sha256(content).hexdigest())
    del content
    # one record stands for all: the sum of the shards' counts must be the manifest's
    write_manifest(tmp_path, Manifest(count, True, [], {}, index, [replace(shard, count=count)]))
    tracemalloc.start()
    source = ShardSource(tmp_path)
    steps = Sampler(count, 4096).epoch(0)
    ids = next(steps).ids
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(ids) == 4096
    assert 28 * count <= held <= 64 * count  # 28: the index and the labels; what counts less did not count at all
    source.close()
