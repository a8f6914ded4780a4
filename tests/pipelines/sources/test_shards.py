from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import tarfile
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from spark_fast.errors import DataError, ImageError
from spark_fast.pipelines.sampler import Sampler
from spark_fast.pipelines.sources.shard_format import (
    INDEX,
    INDEX_FILE,
    MANIFEST,
    Manifest,
    ShardFile,
    read_manifest,
    record_key,
    sealed,
    write_index,
    write_manifest,
    write_shard,
)
from spark_fast.pipelines.sources.shards import ShardSource
from tests.pipelines.building import build
from tests.pipelines.pictures import jpeg

JPEGS = [jpeg(i, 40 + i, 50 + i) for i in range(10)]
LABELS = [3, 0, 12345, 1, 1, 2, 0, 7, 9, 4]
SPREAD = [[7, 2, 9, 4], [0, 5, 1], [8, 3, 6]]  # which sample lies in which shard


def write_all(folder: Path, labelled: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    shards, records = [], []
    for k, numbers in enumerate(SPREAD):
        samples = [(n, f"class/p.{n}.JPEG", LABELS[n] if labelled else -1, JPEGS[n]) for n in numbers]
        shard, its_records = write_shard(folder / f"shard-{k:06d}.tar", samples)
        shards.append(shard)
        records.append(its_records)
    index = write_index(folder / INDEX_FILE, records)
    write_manifest(folder, Manifest(10, labelled, [], {}, index, shards))
    return folder


def edit_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    (folder / MANIFEST).write_bytes(sealed(json.dumps(manifest | changes, indent=1).encode()))


@pytest.mark.parametrize("labelled", [True, False])
def test_samples_come_back_in_the_order_of_the_listing(tmp_path, labelled):
    source = ShardSource(write_all(tmp_path, labelled))
    assert [source.read(i) for i in range(len(source))] == JPEGS
    assert (source.labels.tolist() == LABELS) if labelled else (source.labels is None)
    assert source.name(2) == "shard-000000.tar:00000002-p_2.jpg"
    source.close()


def test_any_tar_reader_reads_the_shards(tmp_path):
    write_all(tmp_path)
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
        assert all(m.mtime == m.uid == m.gid == 0 and not m.uname and m.isreg() for m in tar)
    assert list(members)[:2] == ["00000007-p_7.jpg", "00000007-p_7.cls"]
    assert members["00000002-p_2.jpg"] == JPEGS[2]
    assert members["00000002-p_2.cls"] == b"12345"


def test_a_shard_has_the_bytes_that_tarfile_writes(tmp_path):
    """A name cut to its longest, a label of many digits, contents that fill whole blocks or just do not."""
    contents = [bytes([7] * size) for size in (1, 511, 512, 513, 9000)]
    samples = [(10**i, "n" * 30 * i + ".JPEG", 10**i, jpeg) for i, jpeg in enumerate(contents)]
    shard, records = write_shard(tmp_path / "ours.tar", samples)
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for record, jpeg in zip(records, contents, strict=True):
            for name, content in ((f"{record.key}.jpg", jpeg), (f"{record.key}.cls", str(record.label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    expected = (tmp_path / "theirs.tar").read_bytes()
    assert (tmp_path / "ours.tar").read_bytes() == expected
    assert (shard.bytes, shard.sha256) == (len(expected), hashlib.sha256(expected).hexdigest())


@pytest.mark.parametrize("labelled", [True, False])
def test_the_dali_index_points_at_the_members(tmp_path, labelled):
    write_all(tmp_path, labelled)
    for k, numbers in enumerate(SPREAD):
        data = (tmp_path / f"shard-{k:06d}.tar").read_bytes()
        head, *lines = (tmp_path / f"shard-{k:06d}.idx").read_text().splitlines()
        assert head == f"v1.2 {len(numbers)}"
        for number, line in zip(numbers, lines, strict=True):
            words = line.split()
            parts = [words[i : i + 4] for i in range(0, len(words), 4)]
            assert [part[0] for part in parts] == (["jpg", "cls"] if labelled else ["jpg"])
            contents = [data[int(at) : int(at) + int(size)] for _, at, size, _ in parts]
            assert contents == [JPEGS[number], str(LABELS[number]).encode()][: len(parts)]
            names = [data[int(at) - 512 :].split(b"\0")[0].decode() for _, at, _, _ in parts]
            assert names == [part[3] for part in parts]


def test_the_bytes_are_a_function_of_the_samples(tmp_path):
    first, second = (write_all(tmp_path / name) for name in "ab")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    for shard in read_manifest(first).shards:
        content = (first / shard.file).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("name", ["x" * 300 + ".jpg", "ü/ñ\n.jpg", "a.b.c.JPEG", "..", "-.jpg"])
def test_keys_suit_tar_and_webdataset(name):
    key = record_key(42, name)
    assert key.startswith("00000042-")
    assert key.isascii()
    assert "." not in key
    assert "/" not in key
    assert len(key + ".jpg") <= 100


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


def test_another_format_is_refused(tmp_path):
    edit_manifest(write_all(tmp_path), format=3)
    with pytest.raises(DataError, match="has format 3, this version reads format 2"):
        ShardSource(tmp_path)


@pytest.mark.parametrize("name", ["../shard-000000.tar", "/etc/passwd", "a/b.tar", "..", ""])
def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path, name):
    manifest = read_manifest(write_all(tmp_path))
    shards = [asdict(shard) for shard in manifest.shards]
    shards[0]["file"] = name
    edit_manifest(tmp_path, shards=shards)
    with pytest.raises(DataError, match="names a file outside its folder"):
        ShardSource(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', "\xff"])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    (write_all(tmp_path) / MANIFEST).write_bytes(text.encode("latin1"))
    with pytest.raises(DataError, match=r"manifest.json is damaged"):
        ShardSource(tmp_path)


def test_counts_that_do_not_add_up_are_refused(tmp_path):
    edit_manifest(write_all(tmp_path), count=11)
    with pytest.raises(DataError, match="do not add up to 11"):
        ShardSource(tmp_path)


def test_a_changed_index_is_refused(tmp_path):
    path = write_all(tmp_path) / INDEX_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"index.npy is not the one .* \(sha256 differs\)"):
        ShardSource(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*index.npy"):
        ShardSource(tmp_path)


def test_a_shard_cut_short_while_in_use_is_an_error_not_a_crash(tmp_path):
    source = ShardSource(write_all(tmp_path))
    os.truncate(tmp_path / "shard-000000.tar", 700)
    with pytest.raises(ImageError, match=r"shard-000000.tar was cut short"):
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
