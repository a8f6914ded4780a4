"""What lies in a tar and in the tars in it: one pass over the headers, nothing is unpacked."""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from spark_fast.errors import DataError
from spark_fast.pipelines.sources.folder import check_file_size
from spark_fast.pipelines.sources.listing.class_labels import MOST_BYTES
from spark_fast.pipelines.sources.listing.image_names import IMAGE_EXTENSIONS, LeftOut, is_image, is_machine_made

_BLOCK = 512  # of tar
_SIDECARS = (".cls", ".json", ".txt")  # of an image, in WebDataset's layout


@dataclass
class TarContents:
    """What lies in one tar."""

    images: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> offset and size, in the tar's order
    labels: dict[str, bytes] = field(default_factory=dict)  # name of a .cls without that ending -> its text
    folders: set[str] = field(default_factory=set)  # at the top
    tars: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    has_sidecars: bool = False  # an image and a .cls, .json or .txt of the same name follow each other
    left_out: LeftOut = field(default_factory=LeftOut)


@dataclass
class TarListing:
    """A tar and those in it."""

    path: Path
    outer: TarContents
    inner: dict[str, TarContents]  # by name, in the tar's order

    @property
    def parts(self) -> list[TarContents]:
        """All of them."""
        return [self.outer, *self.inner.values()]

    def left_out(self) -> LeftOut:
        """What none of them counts as an image."""
        total = LeftOut()
        for part in self.parts:
            total.add(part.left_out)
        return total


def list_tar(path: Path, most: int | None = None, endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> TarListing:
    """Read the headers of a tar and of the tars in it; with `most`, of its first members and those of the first in it.

    Members with these endings are images.

    Raises DataError, naming the file, when it is no uncompressed tar, is cut short or damaged, or holds links or names
    outside of itself.
    """
    try:
        with path.open("rb") as file:
            outer = _contents(path, file, 0, os.fstat(file.fileno()).st_size, most, endings)
            inner = {}
            for name, archive in list(outer.tars.items())[: 1 if most else None]:
                start, within = archive.offset_data, f"{posixpath.basename(name)}: "
                inner[name] = _contents(path, file, start, start + archive.size, most, endings, within)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot list the images of {path}: {error}") from error
    return TarListing(path, outer, inner)


def read_member(path: Path, offset: int, size: int, name: str, limit: int) -> bytes:
    """An image's bytes; OSError when they cannot be read, ImageError when more than `limit`.

    Raises DataError when the tar has become shorter since it was listed.
    """
    check_file_size(size, limit)
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise DataError(f"{path} ends within {name}: it was truncated after it was listed")
    return data


def _contents(
    path: Path,
    file: BinaryIO,
    start: int,
    end: int,
    most: int | None,
    endings: tuple[str, ...],
    within: str = "",
) -> TarContents:
    found, before = TarContents(), ("", False)  # the last member's name without its ending, and whether it is an image
    for number, (name, member) in enumerate(_members(path, file, start, end, within)):
        if number == most:
            break
        *folders, base = name.split("/")
        stem, suffix = posixpath.splitext(name)
        if any(map(is_machine_made, [*folders, base] if member.isdir() else folders)):
            found.left_out.machine_files += not member.isdir()
            continue
        if name != "." and (member.isdir() or folders):
            found.folders.add(name.split("/")[0])
        if member.isdir():
            continue
        if base.endswith(".tar") and not within and not is_machine_made(base):
            found.tars[name] = member
            continue
        image = is_image(base, endings)
        if image:
            found.images[name] = member.offset_data, member.size
        elif suffix.lower() == ".cls" and not is_machine_made(base):
            found.labels[stem] = _label(file, member)
        else:
            found.left_out.file(base)
        if before == (stem, not image) and (image or suffix.lower() in _SIDECARS):
            found.has_sidecars = True
        if image or suffix.lower() in _SIDECARS:
            before = stem, image
    return found


def _label(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    """The text of a .cls, as far as it may be the label of an image."""
    return os.pread(file.fileno(), min(member.size, MOST_BYTES + 2), member.offset_data).strip()


def _members(
    path: Path, file: BinaryIO, start: int, end: int, within: str = ""
) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Members of the tar in bytes start ... end of the file, with their names made plain."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all: 1 GB for a million
            if "\0" in member.name:
                raise DataError(f"{path}: {within}{member.name!r} is no name of a file")
            name = posixpath.normpath(member.name)
            if name.startswith(("/", "../")) or name == "..":
                raise DataError(f"{path}: {within}{member.name!r} lies outside the archive. Do not use this data.")
            if not (member.isdir() or (member.isfile() and not member.issparse())):
                raise DataError(f"{path}: {within}{member.name!r} is a link, device or sparse file, not a regular file")
            if not 0 <= member.size <= end - member.offset_data:
                raise DataError(f"{path} is truncated: {within}{member.name} continues beyond its end")
            yield name, member
        # tarfile takes a damaged header for the end: look for the block of zeros that is the true one.
        file.seek(tar.offset)
        if tar.offset + _BLOCK > end or any(file.read(_BLOCK)):
            raise DataError(f"{path} is truncated or damaged at byte {tar.offset}: {within}no header, no end marker")
