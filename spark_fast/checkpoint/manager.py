"""The checkpoints of a run folder: named by step, published late, never fewer than two, whatever is killed when.

    ckpt-last.pth -> checkpoints/step_00000300.pth    a link; whoever copies it gets the whole file
    checkpoints/step_00000300.pth, .pth.sha256        `sha256sum --check` reads the latter
    checkpoints.jsonl                                 a line for every checkpoint ever published

A save is: `.partial` -> fsync -> checksum -> rename -> link -> line -> prune. A kill between any two of them leaves the
checkpoint before it, whole.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from spark_fast.checkpoint.file import Content, RunContent, read_run, write
from spark_fast.checkpoint.validate_file import sidecar
from spark_fast.errors import CheckpointError
from spark_fast.files import sync_folder

log = logging.getLogger("spark_fast")

C = TypeVar("C")

CHECKPOINT = "ckpt-last.pth"
FOLDER = "checkpoints"
RECORD = "checkpoints.jsonl"


class CheckpointManager:
    """The checkpoints of one run, written by one process (`RunLock`).

    Args:
        folder: the run folder.
        keep_last: how many of the newest stay, 2 or more.
        keep_steps: a checkpoint at a multiple of so many steps is never removed; 0: none.
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_steps: int) -> None:
        self.folder, self.keep_last, self.keep_steps = folder, keep_last, keep_steps

    def write(self, step: int, content: Content) -> Path:
        """Write a checkpoint, make it the last one, and prune; returns its path.

        Raises:
            CheckpointError: the file system refuses; those before are kept.
        """
        path = self.folder / FOLDER / f"step_{step:08d}.pth"
        try:
            path.parent.mkdir(exist_ok=True)
            sha256 = write(path, content)
            self._link(path)
            with (self.folder / RECORD).open("a", encoding="utf-8") as record:
                row = {"step": step, "file": path.name, "bytes": path.stat().st_size, "sha256": sha256}
                record.write(json.dumps(row) + "\n")
            self._prune(step)
        except OSError as error:
            raise CheckpointError(f"cannot publish {path}: {error}") from error
        return path

    def _link(self, path: Path) -> None:
        link = self.folder / f"{CHECKPOINT}.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(path.relative_to(self.folder))
        link.replace(self.folder / CHECKPOINT)
        sync_folder(self.folder)

    def _prune(self, newest: int) -> None:
        """Remove what is neither among the newest nor kept permanently; of each pair the checksum last."""
        steps = published(self.folder)
        # newer than the step resumed from (an abandoned branch), or damaged
        spare = [s for s in steps if s > newest]
        spare += [s for s in steps if s <= newest][self.keep_last :]
        for step in spare:
            if step > newest or not self.keep_steps or step % self.keep_steps:
                steps[step].unlink()
                sidecar(steps[step]).unlink(missing_ok=True)

    def clean(self, begun: int) -> None:
        """Remove files that a killed run left half written, and log them; link the checkpoint resumed from.

        Args:
            begun: its step. Checkpoints ahead of it are named: they will go with the first save.

        Raises:
            CheckpointError: the file system refuses.
        """
        try:
            self._clean(begun)
        except OSError as error:
            raise CheckpointError(f"cannot remove old checkpoints from {self.folder}: {error}") from error

    def _clean(self, begun: int) -> None:
        here = self.folder / FOLDER
        orphans = (p for p in here.glob("step_*.sha256") if not p.with_suffix("").exists())
        for path in (*self.folder.glob("*.partial"), *here.glob("*.partial"), *orphans):
            log.warning("removed %s, left unfinished by a killed run", path)
            path.unlink()
        steps = published(self.folder)
        if begun in steps:
            self._link(steps[begun])
        ahead = [path.name for step, path in steps.items() if step > begun]
        if ahead:
            log.warning("resuming from step %d: the first save will remove %s", begun, ", ".join(ahead))


def published(folder: Path) -> dict[int, Path]:
    """step -> checkpoint of a run folder, the newest first. Whatever has this name was complete when it got it."""
    found = (re.fullmatch(r"step_(\d+)\.pth", p.name) for p in (folder / FOLDER).glob("step_*.pth"))
    steps = sorted((int(match[1]) for match in found if match), reverse=True)
    return {step: folder / FOLDER / f"step_{step:08d}.pth" for step in steps}


def candidates(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, the newest first.

    Raises:
        CheckpointError: one was published here, and none is left.
    """
    last = folder / CHECKPOINT
    found = list(published(folder).values())
    if last.is_file() and not last.is_symlink():  # copied with its target, or of an older version
        found.append(last)
    if not found and (last.is_symlink() or (folder / RECORD).exists()):
        raise CheckpointError(
            f"{folder} holds a run whose checkpoints are missing ({RECORD} lists them): restore one, or choose another "
            f"folder for a new run"
        )
    return found


def check_space(folder: Path, size: int, keep_last: int) -> None:
    """Refuse a disk that could not hold the checkpoints of a run: those kept, and the one being written.

    Args:
        size: bytes of one checkpoint.

    Raises:
        CheckpointError: with the figures.
    """
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    missing = max(1, keep_last + 1 - len(published(folder)))
    free = shutil.disk_usage(place).free
    if free < missing * size:
        raise CheckpointError(
            f"not enough disk space for checkpoints in {folder} ({keep_last} are kept while the next is written): "
            f"{missing} more of {size / 1e6:.1f} MB need {missing * size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free "
            f"at {place}"
        )


def read_newest(paths: list[Path]) -> tuple[Path, RunContent]:
    """The first checkpoint that a run can resume from, and its content; raises as `newest_readable`."""
    return newest_readable(paths, read_run)


def newest_readable(paths: list[Path], reader: Callable[[Path], C]) -> tuple[Path, C]:
    """The first checkpoint that can be read, and its content; those before it are named in a warning.

    Args:
        reader: raises CheckpointError for a file that it cannot use.

    Raises:
        CheckpointError: none can be read; with the reason for each.
    """
    reasons = []
    for path in paths:
        try:
            state = reader(path)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            log.warning("%s; using the previous checkpoint, %s", reason, path)
        return path, state
    more = "" if len(paths) == 1 else f"no usable checkpoint in {paths[0].parent}: "
    raise CheckpointError(more + "; ".join(reasons))
