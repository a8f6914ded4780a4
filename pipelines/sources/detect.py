"""What a data path is: shards, a .beton, tars of WebDataset, class folders, a folder of images, or a file list."""

from __future__ import annotations

import re
from pathlib import Path

from spark_fast.commands import command
from spark_fast.errors import DataError
from spark_fast.files import PARTIAL
from spark_fast.pipelines.sources.beton import BetonSource
from spark_fast.pipelines.sources.file_list import list_source
from spark_fast.pipelines.sources.folder import FileSource, folder_source
from spark_fast.pipelines.sources.listing.compressed import how_to_unpack, is_compressed
from spark_fast.pipelines.sources.listing.folder_tree import holds_images, tars_in
from spark_fast.pipelines.sources.listing.image_names import IMAGE_EXTENSIONS
from spark_fast.pipelines.sources.listing.splits import split_of_file, train_folder
from spark_fast.pipelines.sources.shard_format import MANIFEST, read_manifest
from spark_fast.pipelines.sources.shards import ShardSource
from spark_fast.pipelines.sources.source import Source
from spark_fast.pipelines.sources.tar import tar_source
from spark_fast.pipelines.sources.tars.webdataset import looks_like_webdataset, webdataset_source

TARS = {  # as downloaded from image-net.org
    "train": "ILSVRC2012_img_train.tar",
    "val": "ILSVRC2012_img_val.tar",
    "test": "ILSVRC2012_img_test_v10102019.tar",
}
_SHARD = re.compile(r"shard-\d{6}\.tar")  # of a conversion


def detect_source(data_path: str | Path, split: str = "train", endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> Source:
    """The images of a split at `data_path`; files with these endings are images.

    They are in the folder of the split's name, as in the published code. Without such a folder, the path itself holds
    the training images, or tars whose names tell splits apart; other splits need one or the other. The split "all" is
    the path itself, whatever it holds. `splits` says when a folder `train` is a class.

    Raises DataError when there are none, saying what was looked for.
    """
    path = Path(data_path).expanduser()
    if not path.exists():
        raise DataError(f"data_path {path} does not exist{_nearest_existing(path)}")
    if path.is_file():
        if split not in ("train", "all"):
            raise _no_split(path, split)
        if path.suffix == ".beton":
            return BetonSource(path)
        if path.suffix == ".tar" and (_SHARD.fullmatch(path.name) or not looks_like_webdataset(path, endings)):
            raise _no_tars(path, [path.name])
        return images_to_convert(path, endings=endings)
    if split not in ("train", "all") and not (path / split).is_dir():
        if not has_split(path, split):
            raise _no_split(path, split)
    elif split != "all" and not (path / MANIFEST).exists():
        path = train_folder(path, endings) if split == "train" else path / split
    if (path / MANIFEST).exists():
        beton = read_manifest(path).beton
        if beton is not None and beton.alone:
            return BetonSource(path / beton.data.file)
        return ShardSource(path)
    _refuse_unfinished(path, PARTIAL)
    if (tars := tars_in(path)) and not any(looks_like_webdataset(tar, endings) for tar in tars[:4]):
        raise _no_tars(path, [tar.name for tar in tars])
    return images_to_convert(path, split, endings)


def has_split(path: Path, split: str) -> bool:
    """Whether a path is a folder that holds a folder of this name, or tars that are this split by their names."""
    if not path.is_dir():
        return False
    return (path / split).is_dir() or split in [split_of_file(tar.stem) for tar in tars_in(path)]


def images_to_convert(path: Path, split: str = "train", endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> FileSource:
    """The images of a file list, of a tar, or of a folder of images, of class folders, or of tars of WebDataset.

    Raises DataError when there are none, saying what was looked for.
    """
    if path.is_file():
        if is_compressed(path.name):
            raise DataError(how_to_unpack([path]))
        return tar_source(path, endings) if path.suffix == ".tar" else list_source(path)
    _refuse_unfinished(path)
    tars = tars_in(path)
    if any(looks_like_webdataset(tar, endings) for tar in tars[:4]):  # one of them may be damaged
        if holds_images(path, endings):
            raise DataError(f"{path} holds images and tars of images, such as {tars[0].name}: move one kind elsewhere")
        return webdataset_source(path, split, endings)
    return folder_source(path, mixed=split == "all", endings=endings)


def _no_split(path: Path, split: str) -> DataError:
    return DataError(f"{path} holds no folder {split}/, which should be next to train/")


def _nearest_existing(path: Path) -> str:
    parent = next(p for p in path.absolute().parents if p.exists())
    return f": {parent} does, but holds no {path.absolute().relative_to(parent).parts[0]!r}"


def _refuse_unfinished(path: Path, *endings: str) -> None:
    """Raise DataError when a folder cannot be listed, or holds shards, or files with one of these endings."""
    try:
        names = [p.name for p in path.iterdir()]
    except OSError as error:
        raise DataError(f"cannot list {path}: {error}") from error
    if not any(_SHARD.fullmatch(name) or name.endswith(endings) for name in names):
        return
    if MANIFEST in names:
        raise DataError(f"{path} is already converted: give the original images")
    raise DataError(
        f"{path} holds shards but no {MANIFEST}: the conversion was not finished. Run"
        f" {command('convert')} again with the same settings; it continues where it stopped. (If another program"
        " wrote them, rename them: spark_fast uses the names shard-NNNNNN.tar.)"
    )


def _no_tars(path: Path, tars: list[str]) -> DataError:
    """What to do with `tars`, found in the folder `path` or, one, there: training reads their images from shards."""
    if path.is_file() and _SHARD.fullmatch(path.name):
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
        " then --data_path DST. (If it is already unpacked, move the tar elsewhere.)"
    )
