"""Ten images in three shards."""

from __future__ import annotations

from pathlib import Path

from spark_fast.pipelines.sources.shard_format import (
    INDEX_FILE,
    Manifest,
    write_index,
    write_manifest,
    write_shard,
)
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
