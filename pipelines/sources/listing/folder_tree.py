"""The images below a folder, each real folder once, wherever links lead.

Folders come first, links to folders after them: what lies in the tree itself keeps its own path. A link is followed
when it leads to a folder that is not listed yet and does not contain the root; so no loop of links is endless, and no
image is listed twice through them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from spark_fast.errors import DataError
from spark_fast.pipelines.sources.listing.image_names import (
    IMAGE_EXTENSIONS,
    LeftOut,
    is_image,
    is_machine_made,
    listed,
)

logger = logging.getLogger("spark_fast.pipelines")


@dataclass
class FolderTree:
    """What `read_tree` found. Folders are paths below the root, the root itself is ""."""

    root: Path
    endings: tuple[str, ...] = IMAGE_EXTENSIONS  # of what is taken for an image
    images: dict[str, list[bytes]] = field(default_factory=dict)  # folder -> paths below the root, in order
    folders: list[str] = field(default_factory=list)  # directly in the root, in order
    left_out: LeftOut = field(default_factory=LeftOut)
    links: list[str] = field(default_factory=list)  # that were not followed, and why

    def __len__(self) -> int:
        return sum(map(len, self.images.values()))

    def log(self) -> None:
        """Say once what was left out."""
        self.left_out.log(self.root)
        if self.links:
            logger.warning("%s: %d links are not followed: %s", self.root, len(self.links), listed(self.links))


def read_tree(root: Path, endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> FolderTree:
    """List the images below `root`, folder by folder; DataError when one cannot be listed."""
    tree = FolderTree(root, endings)
    for where, names in _walk_or_fail(tree):
        if where and "/" not in where:
            tree.folders.append(where)
        if names:
            prefix = f"{where}/" if where else ""
            tree.images[where] = [os.fsencode(prefix + name) for name in sorted(names)]
    tree.folders.sort()
    tree.images = dict(sorted(tree.images.items()))
    return tree


def holds_images(root: Path, endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> bool:
    """Whether there is an image anywhere below `root`: the search ends at the first."""
    return any(names for _, names in _walk_or_fail(FolderTree(root, endings)))


def files_in(root: Path) -> list[Path]:
    """What lies directly in `root` and is no folder, in order; DataError when it cannot be listed."""
    return [root / name for name, is_folder in _entries(root) if not is_folder]


def tars_in(folder: Path) -> list[Path]:
    """The tars directly in a folder, in order, without machine-made ones; DataError when it cannot be listed."""
    return [path for path in files_in(folder) if path.suffix == ".tar" and not is_machine_made(path.name)]


def folders_in(root: Path) -> list[Path]:
    """The folders directly in `root`, in order, without machine-made ones; DataError when it cannot be listed."""
    return [root / name for name, is_folder in _entries(root) if is_folder and not is_machine_made(name)]


def _entries(root: Path) -> list[tuple[str, bool]]:
    """Name of each entry and whether it is a folder; without asking for the status of every file."""
    try:
        with os.scandir(root) as entries:
            return sorted((entry.name, _is_folder(entry)) for entry in entries)
    except OSError as error:
        raise DataError(f"cannot list {root}: {error}") from error


def _walk_or_fail(tree: FolderTree) -> Iterator[tuple[str, list[str]]]:
    try:
        yield from _walk(tree)
    except OSError as error:
        raise DataError(f"cannot list the images of {tree.root}: {error}") from error


def _walk(tree: FolderTree) -> Iterator[tuple[str, list[str]]]:
    """Every folder below the root with the names of its images, in no order; the rest goes into `tree`."""
    walked: list[str] = []
    links: list[str] = []
    yield from _walk_real(tree, "", walked, links, None)
    if not links:
        return
    real = tree.root.resolve()
    seen = {_identity(parent): f"{parent}, above" for parent in real.parents}
    seen |= {_identity(tree.root / where): where or "the folder itself" for where in walked}
    links.sort()
    for link in links:  # grows: links to folders hold links, too
        if _is_new(tree, link, seen):
            found: list[str] = []
            yield from _walk_real(tree, link, [], found, seen)
            links += sorted(found)


def _walk_real(
    tree: FolderTree, start: str, walked: list[str], links: list[str], seen: dict[tuple[int, int], str] | None
) -> Iterator[tuple[str, list[str]]]:
    """The folders from `start` down without following links, which are put into `links`."""
    todo = [start]
    while todo:
        where = todo.pop()
        walked.append(where)
        images: list[str] = []
        folders: list[str] = []
        with os.scandir(tree.root / where) as entries:
            for entry in entries:
                name = entry.name
                path = f"{where}/{name}" if where else name
                if not _is_folder(entry):
                    if is_image(name, tree.endings):
                        images.append(name)
                    elif entry.is_symlink() and not is_machine_made(name) and not os.path.exists(entry):  # noqa: PTH110
                        tree.links.append(f"{path} (leads nowhere)")
                    else:
                        tree.left_out.file(name)
                elif is_machine_made(name):
                    tree.left_out.folder(name)
                else:
                    (links if entry.is_symlink() else folders).append(path)
        todo += folders if seen is None else [path for path in sorted(folders) if _is_new(tree, path, seen)]
        yield where, images


def _is_new(tree: FolderTree, path: str, seen: dict[tuple[int, int], str]) -> bool:
    """Whether this folder is listed for the first time; if not, it is put down with the place where it is."""
    identity = _identity(tree.root / path)
    if identity in seen:
        tree.links.append(f"{path} (is {seen[identity]})")
        return False
    seen[identity] = path
    return True


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
