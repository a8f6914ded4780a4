"""Folders of files with known content, and how a data path lists them."""

from __future__ import annotations

from pathlib import Path

from spark_fast.pipelines.sources.detect import detect_source


def write(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"image %d" % i)
    return root


def names_of(path: Path) -> list[str]:
    source = detect_source(path)
    return [source.name(i) for i in range(len(source))]
