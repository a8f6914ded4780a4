"""What the name of a file or folder says: an image, something a machine put there, or something left out."""

from __future__ import annotations

import logging
import posixpath
from collections import Counter
from pathlib import Path

logger = logging.getLogger("spark_fast.pipelines")

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp", ".jpe", ".jfif",
)  # fmt: skip
BAND_EXTENSIONS = (*IMAGE_EXTENSIONS, ".npy", ".npz", ".dcm", ".dicom")  # where any number of channels is read
MACHINE_MADE = {  # besides all that is hidden: names in lower case
    "__macosx", "__pycache__", "@eadir", "@recycle", "@__thumb", "#recycle", "#snapshot", "lost+found",
    "$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip
NAMED = 8  # things that a message lists


def is_image(name: str, endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(endings) and not name.startswith(".")


def is_machine_made(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or made by a file manager, a notebook or a disk."""
    return name.startswith(".") or name.lower() in MACHINE_MADE


def ending(name: str) -> str:
    """The ending of a file's name in lower case, both of .tar.gz and its like; "no ending" without one."""
    stem, last = posixpath.splitext(name.lower())
    return ".tar" + last if stem.endswith(".tar") else last or "no ending"


def listed(names: list[str]) -> str:
    """The first of these names and how many more there are, printable."""
    shown = ", ".join(name.encode("utf-8", "backslashreplace").decode() for name in names[:NAMED])
    return shown + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


class LeftOut:
    """Files and folders that a listing leaves out because of their names."""

    def __init__(self) -> None:
        self.endings: Counter[str] = Counter()  # of the files that are no images
        self.machine_files = 0
        self.machine_folders: Counter[str] = Counter()  # by name; nobody looks inside

    def file(self, name: str) -> None:
        """Count a file that is no image."""
        if is_machine_made(name):
            self.machine_files += 1
        else:
            self.endings[ending(name)] += 1

    def folder(self, name: str) -> None:
        """Count a folder that was not looked into."""
        self.machine_folders[name] += 1

    def add(self, other: LeftOut) -> None:
        """Count what another listing leaves out, too."""
        self.endings += other.endings
        self.machine_files += other.machine_files
        self.machine_folders += other.machine_folders

    def log(self, root: Path) -> None:
        """Say once what was left out: as a warning, unless it is what file managers and the like leave behind."""
        if text := self.describe():
            level = logging.WARNING if any(self.endings.values()) else logging.INFO
            logger.log(level, "%s: left out: %s", root, text)

    def describe(self) -> str:
        """What was left out, counted and by ending, for a message; "" when nothing was."""
        parts = []
        if any(self.endings.values()):
            kinds = [f"{kind} ({count})" for kind, count in self.endings.most_common() if count]
            parts.append(f"{self.endings.total()} files by extension: {listed(kinds)}")
        if self.machine_files or self.machine_folders:
            what = [f"{self.machine_files} files"] if self.machine_files else []
            if self.machine_folders:
                what.append(f"{self.machine_folders.total()} folders ({listed(sorted(self.machine_folders))})")
            parts.append(f"hidden or system: {' and '.join(what)}")
        return "; ".join(parts)
