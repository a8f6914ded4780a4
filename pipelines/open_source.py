"""What a data path is: shards, a .beton, class folders, a folder of images, or a file list."""

from __future__ import annotations

from pathlib import Path

from pipelines.beton import BetonSource
from pipelines.contract import DataError
from pipelines.shard_source import ShardSource
from pipelines.shards import MANIFEST, PARTIAL, read_manifest
from pipelines.sources import Source, folder_source, list_source

SPLITS = ("train", "val", "test")


def open_source(data_path: str | Path) -> Source:
    """The training images at `data_path`; a folder train/ in it is meant, as in the published code.

    Raises DataError when there are none, saying what was looked for.
    """
    path = Path(data_path).expanduser()
    if not path.exists():
        raise DataError(f"data_path {path} does not exist{_nearest_existing(path)}")
    if path.is_file() and path.suffix == ".beton":
        return BetonSource(path)
    if path.is_file():
        return list_source(path)
    if (path / "train").is_dir() and not (path / MANIFEST).exists():
        path = path / "train"
    if (path / MANIFEST).exists():
        beton = read_manifest(path).beton
        if beton is not None and beton.alone:
            return BetonSource(path / beton.data.file)
        return ShardSource(path)
    _refuse_unfinished(path)
    return folder_source(path)


def _nearest_existing(path: Path) -> str:
    parent = next(p for p in path.absolute().parents if p.exists())
    return f": {parent} does, but holds no {path.absolute().relative_to(parent).parts[0]!r}"


def _refuse_unfinished(path: Path) -> None:
    try:
        names = sorted(p.name for p in path.iterdir())
    except OSError as error:
        raise DataError(f"cannot list {path}: {error}") from error
    if any(name.endswith((".tar", PARTIAL)) for name in names):
        raise DataError(
            f"{path} holds shards but no {MANIFEST}: the conversion was not finished. Run"
            " tools/convert_imagenet.py again with the same settings; it goes on where it stopped."
        )
