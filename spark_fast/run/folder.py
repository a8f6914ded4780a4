"""The run folder: what is in it from the start, and a copy of everything printed."""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO, TextIO

import torch

import spark_fast
from spark_fast.checkpoint.manager import CHECKPOINT, RECORD, published
from spark_fast.errors import CheckpointError, SettingsError
from spark_fast.run.config import Tree
from spark_fast.run.lock import RunLock
from spark_fast.versions import versions

RESULT = "result.json"  # of an evaluation


def open_run_folder(settings: Tree, lock: RunLock, pictures: str = "") -> Path:
    """Make the run folder; lock it; write config.toml and the head of log.txt; copy stdout and stderr into it.

    `pictures`: a folder in it that is wanted, too; "": none.

    Raises:
        SettingsError: it holds another run and this one does not resume it.
        CheckpointError: it cannot be written, or another run holds it.
    """
    folder = settings.folder
    refuse_another_run(settings)
    try:
        (folder / pictures).mkdir(parents=True, exist_ok=True)
        lock.take()
        (folder / "config.toml").write_text(settings.to_toml())
        with (folder / "log.txt").open("a") as log:
            log.write(json.dumps(describe(settings)) + "\n")
        sys.stdout = _Copied(sys.stdout, folder / "stdout_backup.txt")
        sys.stderr = _Copied(sys.stderr, folder / "stderr_backup.txt")
    except OSError as error:
        raise CheckpointError(f"the run folder {folder} cannot be written: {error}") from error
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    return folder


def refuse_another_run(settings: Tree) -> None:
    """Raise SettingsError if the run folder holds a run, or its result, that this one does not resume."""
    left = (CHECKPOINT, RECORD, RESULT)
    held = any(os.path.lexists(settings.folder / name) for name in left) or published(settings.folder)
    if held and not settings.run.resume:
        raise SettingsError(
            f"{settings.folder} holds a run already: go on with --resume auto, or choose another <experiment_name>"
        )


def describe(settings: Tree) -> dict:
    """What a reader needs to repeat the run: commit, versions, machine, command, settings."""
    return {
        "name": settings.run.exp_name,
        "cmd": shlex.join(sys.argv),
        "git_commit_id": _git_commit(),
        "versions": versions(),
        "machine": {"host": platform.node(), "cpus": os.cpu_count(), "gpus": torch.cuda.device_count()},
        "settings": settings.to_dict(),
    }


def _git_commit() -> str:
    """The commit of this program's checkout, or [unknown] where it was installed without one."""
    here = Path(spark_fast.__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return "[unknown]"
    return found.stdout.strip() or "[unknown]"


class _Copied:
    """A stream that also writes to a file, until that fails (a full disk): a copy must not end the run."""

    def __init__(self, stream: TextIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self._file: BinaryIO | None = path.open("ab", buffering=0)

    def write(self, text: str) -> int:
        if self._file is not None:
            try:
                self._file.write(text.encode(errors="backslashreplace"))
            except OSError as error:
                self._file = None
                self._stream.write(f"what is printed is no longer copied to {self._path}: {error}\n")
        return self._stream.write(text)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
