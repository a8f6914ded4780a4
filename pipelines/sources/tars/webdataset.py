"""Tars in WebDataset's layout: the files of a sample lie side by side and share a name, `0001.jpg`, `0001.cls`.

A tar, a folder of tars, or a tar of tars. Labels are the numbers or names in the .cls; a tar's name, or a folder in a
sample's name, is no class. Samples keep the order of the tars' names and of their places in them.
"""

from __future__ import annotations

import logging
import os
import posixpath
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import DataError
from spark_fast.pipelines.sources.folder import FileSource
from spark_fast.pipelines.sources.listing.class_labels import class_numbers
from spark_fast.pipelines.sources.listing.folder_tree import files_in, tars_in
from spark_fast.pipelines.sources.listing.image_names import IMAGE_EXTENSIONS, LeftOut, is_machine_made, listed
from spark_fast.pipelines.sources.listing.splits import SPLITS, split_of_file
from spark_fast.pipelines.sources.tars.tar_members import TarContents, TarListing, list_tar, read_member

logger = logging.getLogger("spark_fast.pipelines")

_LOOKED_AT = 256  # members of a tar, to tell its layout


class TarSource(FileSource):
    """Images in `tars`. `ranges` is (n, 3) int64: for each image its tar's number, its offset and its size in bytes."""

    def __init__(
        self,
        root: Path,
        names: Iterable[bytes],
        labels: NDArray[np.int32] | None,
        classes: list[str],
        tars: list[Path],
        ranges: NDArray[np.int64],
    ) -> None:
        super().__init__(root, names, labels, classes)
        self._tars, self._ranges = tars, ranges

    def read(self, i: int) -> bytes:
        """The image's bytes; OSError when they cannot be read, ImageError when absurdly many.

        Raises DataError when the tar has become shorter since it was listed.
        """
        tar, offset, size = self._ranges[i].tolist()
        return read_member(self._tars[tar], offset, size, self.name(i), self.max_file_bytes)

    def subset(self, ids: NDArray[np.int64]) -> TarSource:
        """The samples `ids`, (m,), renumbered from 0."""
        part = super().subset(ids)
        assert isinstance(part, TarSource)
        part._ranges = self._ranges[ids]
        return part


def looks_like_webdataset(tar: Path, endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> bool:
    """Whether the first members of a tar, or of the first tar in it, are of this layout; False if it is no tar."""
    try:
        return holds_webdataset(listing := list_tar(tar, _LOOKED_AT, endings)) or _has_sidecars(listing)
    except DataError:
        return False


def holds_webdataset(listing: TarListing) -> bool:
    """Whether a tar has labels beside its images, or the tars in it have labels or other files beside theirs."""
    labelled = any(_label_of(name, part) is not None for part in listing.parts for name in part.images if part.labels)
    return labelled or any(part.has_sidecars for part in listing.inner.values())


def webdataset_source(folder: Path, split: str, endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> TarSource:
    """The images of the tars in a folder; of those of a split ("all" for all), where their names tell splits apart.

    Raises DataError when they cannot be read, or it is not clear which are meant.
    """
    tars = tars_of_split(folder, split)
    source = source_of_listings(folder, [list_tar(tar, endings=endings) for tar in tars], endings)
    others = LeftOut()
    for path in files_in(folder):
        if path.suffix != ".tar" or is_machine_made(path.name):
            others.file(path.name)
    others.log(folder)
    return source


def tars_of_split(folder: Path, split: str) -> list[Path]:
    """The tars of a split, by their names: imagenet1k-train-0000.tar; all of them where these do not tell splits apart.

    Raises DataError when only some name a split, or none this one.
    """
    tars = tars_in(folder)
    kinds = {path: split_of_file(path.stem) for path in tars}
    if split == "all" or len(set(kinds.values())) == 1:
        return tars
    if unclear := [path.name for path, kind in kinds.items() if kind is None]:
        raise DataError(
            f"{folder} holds tars of several splits, and {unclear[0]}, whose name has no split: move it elsewhere"
        )
    taken = [path for path in tars if kinds[path] == split]
    if not taken:
        raise DataError(f"{folder} holds tars of several splits, but none of {split}: {listed([p.name for p in tars])}")
    logger.info("%s: %d tars of %s are read, %d others are left out", folder, len(taken), split, len(tars) - len(taken))
    return taken


class _Sample(NamedTuple):
    name: str
    label: bytes | None
    range: tuple[int, int, int]  # number of the tar, offset, size


def splits_of_tars(folder: Path) -> list[str]:
    """The splits that the names of the tars in a folder tell apart, where they do: none or several."""
    kinds = [split for split in SPLITS if split in {split_of_file(path.stem) for path in tars_in(folder)}]
    return kinds if len(kinds) > 1 else []


def source_of_listings(
    root: Path, listings: list[TarListing], endings: tuple[str, ...] = IMAGE_EXTENSIONS
) -> TarSource:
    """The images of tars that are listed already; `root` is their folder, or the one tar.

    Raises DataError when there is none, or a label is no class.
    """
    samples = [sample for number, listing in enumerate(listings) for sample in _samples(root, number, listing)]
    if not samples:
        raise DataError(f"no images in {root}: no file in its tars ends in {', '.join(endings)}")
    left_out = LeftOut()
    for listing in listings:
        left_out.add(listing.left_out())
    left_out.log(root)
    labels: NDArray[np.int32] | None = None
    classes: list[str] = []
    if texts := [sample.label for sample in samples if sample.label is not None]:
        if without := [sample.name for sample in samples if sample.label is None]:
            logger.warning("%s: %d images without a label are left out: %s", root, len(without), listed(without))
            samples = [sample for sample in samples if sample.label is not None]
        labels, classes = class_numbers(texts, lambda i: f"{root}, {samples[i].name}")
    ranges = np.array([sample.range for sample in samples], dtype=np.int64)
    names = (os.fsencode(sample.name) for sample in samples)
    return TarSource(root, names, labels, classes, [listing.path for listing in listings], ranges)


def _samples(root: Path, number: int, listing: TarListing) -> Iterator[_Sample]:
    """The images of a tar and of those in it, under the names of the tars that hold them."""
    _refuse_mixed_tars(listing)
    prefix = "" if listing.path == root else f"{listing.path.stem}/"
    parts = {f"{prefix}{name.removesuffix('.tar')}/": part for name, part in sorted(listing.inner.items())}
    for before, part in ({prefix: listing.outer} | parts).items():
        stems = {_stem(name) for name in part.images} if part.labels else set()
        for name, (offset, size) in part.images.items():
            yield _Sample(before + name, _label_of(name, part, stems), (number, offset, size))


def _label_of(name: str, part: TarContents, stems: AbstractSet[str] = frozenset()) -> bytes | None:
    """The .cls of the image's name, or else of its part before the first dot (`0001.left.jpg`).

    Not if that is the name of another image, one of `stems`: then this one is a mask or the like.
    """
    stem = _stem(name)
    folder, base = posixpath.split(name)
    key = posixpath.join(folder, base.split(".")[0])
    return part.labels.get(stem, None if key in stems else part.labels.get(key))


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _refuse_mixed_tars(listing: TarListing) -> None:
    kinds = {split_of_file(posixpath.basename(name).removesuffix(".tar")) for name in listing.inner}
    if len(kinds - {None}) > 1:
        raise DataError(
            f"{listing.path} holds tars of several splits ({listed(sorted(listing.inner))}): unpack it, tar -xf"
            f" {listing.path}, and give the folder of the tars"
        )


def _has_sidecars(listing: TarListing) -> bool:
    return any(part.has_sidecars for part in listing.parts)
