"""Where image bytes come from: files of their own, in a folder of images or of class folders.

The index of a source is two flat buffers, not a list of paths: a million images take about 50 MB and
travel to another process in one piece.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterable
from copy import copy
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import DataError, ImageError
from spark_fast.pipelines.sources.listing.compressed import how_to_unpack, is_compressed
from spark_fast.pipelines.sources.listing.folder_tree import FolderTree, files_in, read_tree
from spark_fast.pipelines.sources.listing.image_names import BAND_EXTENSIONS, IMAGE_EXTENSIONS, listed
from spark_fast.pipelines.sources.listing.splits import refuse_mixed_splits
from spark_fast.pipelines.transforms.file_kinds import PAGE

logger = logging.getLogger("spark_fast.pipelines")

MAX_FILE_BYTES = 256 * 2**20  # no image of at most 64 Mpx is larger: 4 bytes a pixel


class FileSource:
    """Images in files of their own, listed by their paths below `root`; `labels` is (n,), None without classes."""

    max_file_bytes = MAX_FILE_BYTES  # of a file that is read

    def __init__(
        self, root: Path, names: Iterable[bytes], labels: NDArray[np.int32] | None, classes: list[str]
    ) -> None:
        self.root = root
        self.labels = labels
        self.classes = classes
        self._text, self._ends = _in_one_piece(names)

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, i: int) -> bytes:
        """Path below `root`, as the file system spells it."""
        return self._text[self._ends[i - 1] if i else 0 : self._ends[i]]

    def read(self, i: int) -> bytes:
        """The file's bytes; OSError when it cannot be read, ImageError when it is absurdly large or no plain file."""
        path = os.fsencode(self.root) + b"/" + self.path(i)  # pathlib's joining costs a fifth of the reading
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for ever
        with os.fdopen(file, "rb", buffering=0) as opened:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("it is a folder, pipe or device, not a regular file")
            check_file_size(status.st_size, self.max_file_bytes)
            return opened.read()

    def name(self, i: int) -> str:
        """Path below `root`, printable."""
        return self.path(i).decode("utf-8", "backslashreplace")

    def subset(self, ids: NDArray[np.int64]) -> FileSource:
        """The samples `ids`, (m,), renumbered from 0."""
        part = copy(self)
        part.labels = None if self.labels is None else self.labels[ids]
        part._text, part._ends = _in_one_piece(map(self.path, ids.tolist()))
        return part

    def allow_pixels(self, max_pixels: int) -> None:
        """Read files as large as images of so many pixels may be."""
        self.max_file_bytes = max(MAX_FILE_BYTES, 4 * max_pixels)

    def fingerprint(self) -> str:
        """sha256 of all names and labels: equal for equal listings, wherever they are mounted."""
        digest = hashlib.sha256(self._text)
        digest.update(self._ends.tobytes())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Nothing is held open."""


def _in_one_piece(names: Iterable[bytes]) -> tuple[bytes, NDArray[np.int64]]:
    """All names one after the other, and where each ends."""
    names = list(names)
    return b"".join(names), np.cumsum([len(name) for name in names], dtype=np.int64)


def folder_source(root: Path, *, mixed: bool = False, endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> FileSource:
    """A folder of class folders (labelled, as torchvision's ImageFolder numbers them) or of images.

    A class folder without images keeps its number. With `mixed` folders that look like several splits are accepted.

    Raises DataError when it cannot be listed, holds no image, or several splits.
    """
    tree = read_tree(root, endings)
    if not tree.images:
        raise _no_images(tree)
    if not mixed:
        refuse_mixed_splits(root, tree.images)
    tree.log()
    loose = tree.images.pop("", [])
    if not tree.images:
        return FileSource(root, loose, None, [])
    if loose:
        logger.warning("%s: %d images outside the class folders are left out", root, len(loose))
    of_class: dict[str, list[bytes]] = {name: [] for name in tree.folders}
    for where, names in tree.images.items():
        of_class[where.split("/", 1)[0]] += names
    if empty := [name for name, names in of_class.items() if not names]:
        logger.warning("%s: %d class folders have no images: %s", root, len(empty), listed(empty))
    labels = np.repeat(np.arange(len(of_class), dtype=np.int32), [len(names) for names in of_class.values()])
    return FileSource(root, chain.from_iterable(of_class.values()), labels, tree.folders)


def _no_images(tree: FolderTree) -> DataError:
    root, files = tree.root, files_in(tree.root)
    kinds = f" Left out: {text}." if (text := tree.left_out.describe()) else ""
    links = f" Links that are not followed: {listed(tree.links)}." if tree.links else ""
    arrays = sorted({*tree.left_out.endings} & {*BAND_EXTENSIONS} - {*tree.endings})
    read_as = f" Files ending in {', '.join(arrays)} are read with --in_chans." if arrays else ""
    packed = [path for path in files if is_compressed(path.name)]
    return DataError(
        f"no images in {root}: it holds {len(tree.folders)} folders and {len(files)} other"
        f" entries, but no file ending in {', '.join(tree.endings)}, neither directly nor in class"
        " folders. Point data_path at a folder of images, of class folders, or one that holds train/."
        f"{kinds}{read_as}{links}{' ' + how_to_unpack(packed) if packed else ''} See {PAGE}."
    )


def check_file_size(size: int, limit: int = MAX_FILE_BYTES) -> None:
    """ImageError when no image is so many bytes long."""
    if size > limit:
        raise ImageError(
            f"the file has {size} bytes, more than the limit of {limit}: if it is an image,"
            f" --max_pixels {size // 2**22 + 1} (train, eval, convert) reads it"
        )
