"""Where image bytes come from: folders of images and file lists.

The index of a source is two flat buffers, not a list of paths: a million images take about 50 MB and
travel to another process in one piece.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import DataError, ImageError

logger = logging.getLogger("spark_fast.pipelines")

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
MAX_FILE_BYTES = 256 * 2**20  # no image of at most 64 Mpx is larger: 4 bytes a pixel


class FileSource:
    """Images in files of their own, listed by their paths below `root`."""

    max_file_bytes = MAX_FILE_BYTES  # of a file that is read

    def __init__(
        self, root: Path, names: Iterable[bytes], labels: NDArray[np.int32] | None, classes: list[str]
    ) -> None:
        names = list(names)
        self.root = root
        self.labels = labels
        self.classes = classes
        self._text = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)

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
                raise ImageError("it is a folder, pipe or device, no plain file")
            check_file_size(status.st_size, self.max_file_bytes)
            return opened.read()

    def name(self, i: int) -> str:
        """Path below `root`, printable."""
        return self.path(i).decode("utf-8", "backslashreplace")

    def subset(self, ids: NDArray[np.int64]) -> FileSource:
        """The samples `ids`, renumbered from 0."""
        labels = None if self.labels is None else self.labels[ids]
        part = FileSource(self.root, map(self.path, ids.tolist()), labels, self.classes)
        part.max_file_bytes = self.max_file_bytes
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


def folder_source(root: Path) -> FileSource:
    """A folder of class folders (labelled, as torchvision's ImageFolder numbers them) or of images.

    Raises DataError when it cannot be listed or holds no image.
    """
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
        folders = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        loose = [os.fsencode(e.name) for e in entries if not e.is_dir() and is_image(e.name)]
        names: list[bytes] = []
        counts: list[int] = []
        for folder in folders:
            found = list(_images_below(root, folder))
            names += found
            counts.append(len(found))
    except OSError as error:
        raise DataError(f"cannot list the images of {root}: {error}") from error
    if names:
        if loose:
            logger.warning("%s: %d images outside the class folders are left out", root, len(loose))
        labels = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
        return FileSource(root, names, labels, folders)
    if loose:
        return FileSource(root, loose, None, [])
    raise DataError(
        f"no images in {root}: it holds {len(folders)} folders and {len(entries) - len(folders)} other"
        f" entries, but no file ending in {', '.join(IMAGE_EXTENSIONS)}, neither directly nor in class"
        " folders. Point data_path at a folder of images, of class folders, or one that holds train/."
    )


def _images_below(root: Path, folder: str) -> Iterator[bytes]:
    """Paths below `root` of the images in `folder`, at any depth, in torchvision's order."""

    def fail(error: OSError) -> None:
        raise error

    for where, _, files in sorted(os.walk(root / folder, followlinks=True, onerror=fail)):
        inside = os.path.relpath(where, root)
        for file in sorted(filter(is_image, files)):
            yield os.fsencode(f"{inside}/{file}")


def check_file_size(size: int, limit: int = MAX_FILE_BYTES) -> None:
    """ImageError when no image is so many bytes long."""
    if size > limit:
        raise ImageError(
            f"the file has {size} bytes, more than the limit of {limit}: if it is an image,"
            f" --max_pixels {size // 2**22 + 1} (train, eval, convert) reads it"
        )


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def list_source(path: Path) -> FileSource:
    """A text file with one image a line, `path` or `path label`, relative to the list's own folder.

    Raises DataError when it cannot be read, is empty or no list, labels only some lines, or names a file
    outside its folder.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the file list {path}: {error}") from error
    if b"\0" in content:
        raise DataError(f"{path} is no file list: it holds binary data. Expected one image path a line.")
    lines = [(n, line) for n, line in enumerate(content.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"the file list {path} is empty: expected one image path a line.")
    names: list[bytes] = []
    labels: list[int | None] = []
    for number, line in lines:
        name, label = _parse_line(line)
        _check_inside(name, path, number)
        if labels and (label is None) != (labels[0] is None):
            raise DataError(f"{path}, line {number}: either all lines have a label or none; this differs")
        names.append(name)
        labels.append(label)
    source = FileSource(
        path.parent,
        names,
        None if labels[0] is None else np.array(labels, dtype=np.int32),
        [],
    )
    if not any((path.parent / os.fsdecode(name)).exists() for name in names[:16]):
        raise DataError(
            f"the file list {path} names no existing file: {path.parent / source.name(0)} is missing, and so"
            " are those after it. Paths are relative to the list's folder."
        )
    return source


def _parse_line(line: bytes) -> tuple[bytes, int | None]:
    """`path`, `path<TAB>label` or `path label`; a path may contain spaces, its last word is no number."""
    name, separator, label = line.rstrip().rpartition(b"\t" if b"\t" in line else b" ")
    if separator and label.isdigit() and int(label) < 2**31:
        return name.strip(), int(label)
    return line.strip(), None


def _check_inside(name: bytes, path: Path, number: int) -> None:
    inside = os.path.normpath(name)
    if inside.startswith((b"/", b"../")) or inside == b"..":
        raise DataError(
            f"{path}, line {number}: {os.fsdecode(name)!r} lies outside the list's folder. Put the list at"
            " the top of the images' folder and use paths relative to it."
        )
