"""What a data path is: shards, a .beton, class folders, a folder of images, or a file list."""

from __future__ import annotations

import re
from pathlib import Path

from spark_fast.commands import command
from spark_fast.errors import DataError
from spark_fast.files import PARTIAL
from spark_fast.pipelines.sources.beton import BetonSource
from spark_fast.pipelines.sources.folder import folder_source, list_source
from spark_fast.pipelines.sources.shard_format import MANIFEST, read_manifest
from spark_fast.pipelines.sources.shards import ShardSource
from spark_fast.pipelines.sources.source import Source

SPLITS = ("train", "val", "test")
TARS = {  # as downloaded from image-net.org
    "train": "ILSVRC2012_img_train.tar",
    "val": "ILSVRC2012_img_val.tar",
    "test": "ILSVRC2012_img_test_v10102019.tar",
}
_OF_CONVERSION = re.compile(rf"shard-\d{{6}}\.tar|.*{re.escape(PARTIAL)}")  # an unfinished one, without a manifest


def detect_source(data_path: str | Path, split: str = "train") -> Source:
    """The images of a split at `data_path`.

    They are in the folder of the split's name, as in the published code. Without such a folder, the path itself holds
    the training images; other splits need one. The split "all" is the path itself, whatever it holds.

    Raises DataError when there are none, saying what was looked for.
    """
    path = Path(data_path).expanduser()
    if not path.exists():
        raise DataError(f"data_path {path} does not exist{_nearest_existing(path)}")
    if split not in ("train", "all") and not (path / split).is_dir():
        raise DataError(f"{path} holds no folder {split}/, which should lie beside train/")
    if path.is_file() and path.suffix == ".beton":
        return BetonSource(path)
    if path.is_file():
        if path.suffix == ".tar":
            raise _no_tars(path, [path.name])
        return list_source(path)
    if split != "all" and (path / split).is_dir() and not (path / MANIFEST).exists():
        path = path / split
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
    if any(map(_OF_CONVERSION.fullmatch, names)):
        raise DataError(
            f"{path} holds shards but no {MANIFEST}: the conversion was not finished. Run"
            f" {command('convert')} again with the same settings; it goes on where it stopped."
        )
    if tars := [name for name in names if name.endswith(".tar")]:
        raise _no_tars(path, tars)


def _no_tars(path: Path, tars: list[str]) -> DataError:
    """What to do with `tars`, found in the folder `path` or, one, there: training reads their images from shards."""
    if path.is_file() and _OF_CONVERSION.fullmatch(path.name):
        return DataError(f"{path} is one shard of a conversion: give its folder, {path.parent}")
    if len(tars) == 1 and path.is_file():
        what, src = f"{path} is a tar", path
    elif set(tars) & set(TARS.values()):
        what, src = f"{path} holds tars as downloaded ({', '.join(tars)})", path
    elif len(tars) == 1:
        what, src = f"{path} holds a tar", path / tars[0]
    else:
        what, src = f"{path} holds {len(tars)} tars ({tars[0]} ...)", Path("THE_TAR_THEY_WERE_IN")
    return DataError(
        f"{what}, which training does not read. Convert once: {command('convert')} {src} DST,"
        " then --data_path DST. (Unpacked already? Then move what is packed elsewhere.)"
    )
