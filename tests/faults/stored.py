"""Encoded images, sound or not, as a folder of files and as a shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spark_fast.pipelines.sources.shard_format import (
    INDEX_FILE,
    JPG,
    Manifest,
    write_index,
    write_manifest,
    write_shard,
)


def folder_of(root: Path, images: list[bytes], ending: str = ".JPEG") -> Path:
    """An ending says nothing of what is in the file."""
    root.mkdir()
    for i, data in enumerate(images):
        (root / f"{i:04d}{ending}").write_bytes(data)
    return root


def shards_of(
    root: Path, images: list[bytes], ending: str = ".JPEG", record: str = JPG, made_from: dict[str, Any] | None = None
) -> Path:
    """One shard that holds these bytes under right checksums."""
    root.mkdir()
    numbered = [(i, f"{i:04d}{ending}", i % 3, data) for i, data in enumerate(images)]
    shard, records = write_shard(root / "shard-000000.tar", numbered, record)
    index = write_index(root / INDEX_FILE, [records])
    write_manifest(root, Manifest(len(images), True, ["a", "b", "c"], made_from or {}, index, [shard]))
    return root
