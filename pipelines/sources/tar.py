"""Images inside a tar, read where they lie: nothing is unpacked.

An archive of class archives (ILSVRC2012_img_train.tar: one nXXXXXXXX.tar a class), of class folders, or of images
alone (ILSVRC2012_img_val.tar). It is listed once; then each image is one read at a known offset, so that any number
of threads and processes may read. The listing is that of the folder one would get by unpacking: the same images in
the same order under the same names and labels, hence the same shards.
"""

from __future__ import annotations

import logging
import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import DataError
from spark_fast.pipelines.sources.folder import IMAGE_EXTENSIONS, FileSource, check_file_size, is_image

logger = logging.getLogger("spark_fast.pipelines")

_BLOCK = 512  # of tar


class TarSource(FileSource):
    """Images at `ranges`, (n, 2) int64 offset and size in bytes, of the tar `root`."""

    def __init__(
        self,
        root: Path,
        names: list[bytes],
        labels: NDArray[np.int32] | None,
        classes: list[str],
        ranges: NDArray[np.int64],
    ) -> None:
        super().__init__(root, names, labels, classes)
        self._ranges = ranges

    def read(self, i: int) -> bytes:
        """The image's bytes; OSError when they cannot be read, ImageError when absurdly many.

        Raises DataError when the tar has become shorter since it was listed.
        """
        offset, size = self._ranges[i].tolist()
        check_file_size(size, self.max_file_bytes)
        with self.root.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise DataError(f"{self.root} ends within {self.name(i)}: it was cut short after it was listed")
        return data

    def subset(self, ids: NDArray[np.int64]) -> TarSource:
        """The samples `ids`, renumbered from 0."""
        labels = None if self.labels is None else self.labels[ids]
        part = TarSource(self.root, [self.path(i) for i in ids.tolist()], labels, self.classes, self._ranges[ids])
        part.max_file_bytes = self.max_file_bytes
        return part


def tar_source(path: Path) -> TarSource:
    """List the images of a tar, labelled by class archive or folder if it has such, else unlabelled.

    Raises DataError, naming the file, when it is no uncompressed tar, is cut short or damaged, holds links or names
    outside of itself, or has no image.
    """
    try:
        with path.open("rb") as file:
            found, classes = _images_of(path, file)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot list the images of {path}: {error}") from error
    if classes:
        if loose := [name for name in found if "/" not in name]:
            logger.warning("%s: %d images outside the classes are left out", path, len(loose))
        found = {name: where for name, where in found.items() if "/" in name}
    if not found:
        raise DataError(f"no images in {path}: nothing in it ends in {', '.join(IMAGE_EXTENSIONS)}")
    names = sorted(found, key=lambda name: (name.split("/")[0] if classes else "", *posixpath.split(name)))
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name.split("/")[0]] for name in names], dtype=np.int32) if classes else None
    ranges = np.array([found[name] for name in names], dtype=np.int64)
    return TarSource(path, [os.fsencode(name) for name in names], labels, classes, ranges)


def _images_of(path: Path, file: BinaryIO) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Offset and size of each image, by its name were all unpacked, and the classes' names in order."""
    images: dict[str, tuple[int, int]] = {}
    classes: set[str] = set()
    archives: dict[str, tuple[str, tarfile.TarInfo]] = {}
    for name, member in _members(path, file, 0, os.fstat(file.fileno()).st_size):
        if member.isdir() or "/" in name:
            classes.add(name.split("/")[0])
        if name.endswith(".tar") and member.isfile():
            folder = posixpath.basename(name).removesuffix(".tar")
            if folder in archives and archives[folder][0] != name:
                raise DataError(
                    f"{path} holds the class {folder} twice, {archives[folder][0]} and {name}: which is meant?"
                )
            archives[folder] = name, member
        elif member.isfile() and is_image(posixpath.basename(name)):
            images[name] = member.offset_data, member.size
    if archives:
        classes = set(archives)  # whatever folder they lie in
    for folder, (_, archive) in archives.items():
        end = archive.offset_data + archive.size
        for name, member in _members(path, file, archive.offset_data, end, f"{folder}.tar: "):
            if member.isfile() and is_image(posixpath.basename(name)):
                images[f"{folder}/{name}"] = member.offset_data, member.size
    classes.discard(".")
    return images, sorted(classes) if any("/" in name for name in images) else []


def _members(
    path: Path, file: BinaryIO, start: int, end: int, within: str = ""
) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Members of the tar in bytes start ... end of the file, with their names made plain."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all: 1 GB for a million
            name = posixpath.normpath(member.name)
            if name.startswith(("/", "../")) or name == "..":
                raise DataError(f"{path}: {within}{member.name!r} lies outside the archive. Do not use this data.")
            if not (member.isdir() or (member.isfile() and not member.issparse())):
                raise DataError(f"{path}: {within}{member.name!r} is a link, device or sparse file, no plain one")
            if not 0 <= member.size <= end - member.offset_data:
                raise DataError(f"{path} is cut short: {within}{member.name} goes on beyond its end")
            yield name, member
        # tarfile takes a damaged header for the end: look for the block of zeros that is the true one.
        file.seek(tar.offset)
        if tar.offset + _BLOCK > end or any(file.read(_BLOCK)):
            raise DataError(f"{path} is cut short or damaged at byte {tar.offset}: {within}no header, no end mark")
