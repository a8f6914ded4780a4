from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import asdict
from pathlib import Path

import pytest

from spark_fast.errors import DataError
from spark_fast.pipelines.sources.shard_format import (
    INDEX_FILE,
    MANIFEST,
    read_manifest,
    record_key,
    sealed,
    write_shard,
)
from spark_fast.pipelines.sources.shards import ShardSource
from tests.pipelines.sources.ten_images import JPEGS, LABELS, SPREAD, write_all


def edit_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    (folder / MANIFEST).write_bytes(sealed(json.dumps(manifest | changes, indent=1).encode()))


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
    with pytest.raises(DataError, match=r"index.npy does not belong to .* \(sha256 differs\)"):
        ShardSource(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*index.npy"):
        ShardSource(tmp_path)
