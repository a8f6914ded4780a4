from __future__ import annotations

import re
from pathlib import Path

import pytest

from spark_fast.pipelines.convert.conversion import convert
from spark_fast.pipelines.convert.verify_shards import verify_shards
from tests.pipelines.convert.test_conversion import settings


def damage(folder: Path, what: str) -> str:
    """Do one kind of damage; returns what verify must say about it."""
    shard, idx = folder / "shard-000001.tar", folder / "shard-000001.idx"
    data = bytearray(shard.read_bytes())
    if what == "image":
        data[900] ^= 4
        shard.write_bytes(data)
        return r"shard-000001.tar, record at byte 512 \(\d{8}-\d{4}.jpg\): checksum differs"
    if what == "label":
        at = data.index(b".cls")
        data[at - at % 512 + 512] ^= 1
        shard.write_bytes(data)
        return "shard-000001.tar: members or labels differ from the index"
    if what == "padding":
        data[-1] = 1
        shard.write_bytes(data)
        return "shard-000001.tar: sha256 differs"
    if what == "cut":
        shard.write_bytes(data[:3000])
        return "shard-000001.tar, record at byte .*: cut short"
    if what == "missing":
        shard.unlink()
        return "shard-000001.tar: cannot be read"
    assert what == "idx"
    idx.write_text(idx.read_text().replace("jpg 512", "jpg 513"))
    return "shard-000001.idx: does not fit its shard"


@pytest.mark.parametrize("what", ["image", "label", "padding", "cut", "missing", "idx"])
def test_verify_finds_every_damage_and_names_it(image_folder, tmp_path, what):
    convert(image_folder(), tmp_path / "out", settings())
    folder = tmp_path / "out" / "train"
    assert verify_shards(folder, workers=2) == []
    expected = damage(folder, what)
    faults = verify_shards(folder, workers=2)
    assert any(re.search(expected, fault) for fault in faults), faults
    assert all("shard-000001" in fault for fault in faults)
