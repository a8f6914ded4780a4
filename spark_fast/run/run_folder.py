"""The run folder: what is in it from the start, and a copy of everything printed."""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from spark_fast.checkpoint.manager import CHECKPOINT, RECORD, published
from spark_fast.errors import CheckpointError, SettingsError
from spark_fast.run.lock import RunLock
from spark_fast.streams import keep_output
from spark_fast.versions import versions

RESULT = "result.json"  # of an evaluation
STOPPED = "stopped.txt"  # is there from a planned stop until the run is resumed


def open_run_folder(folder: Path, lock: RunLock, config: str, head: Mapping[str, object], pictures: str = "") -> Path:
    """Make the run folder; lock it; write config.toml and the head of log.txt; copy stdout and stderr into it.

    Args:
        config: the settings as TOML, for config.toml.
        head: for log.txt, see `describe`.
        pictures: a folder in it that is wanted, too; "": none.

    Raises:
        CheckpointError: it cannot be written, or another run holds it.
    """
    try:
        (folder / pictures).mkdir(parents=True, exist_ok=True)
        lock.take()
        (folder / "config.toml").write_text(config, encoding="utf-8", errors="surrogateescape")  # paths as bytes
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(json.dumps(head) + "\n")
        (folder / STOPPED).unlink(missing_ok=True)
        for stream, name in zip(keep_output(), ("stdout_backup.txt", "stderr_backup.txt"), strict=True):
            stream.copy_to(folder / name)
    except OSError as error:
        raise CheckpointError(f"the run folder {folder} cannot be written: {error}") from error
    return folder


def refuse_another_run(folder: Path, resumable: bool = True) -> None:
    """Raise SettingsError if the folder holds a run already, or its result."""
    left = (CHECKPOINT, RECORD, RESULT)
    if any(os.path.lexists(folder / name) for name in left) or published(folder):
        what_to_do = "continue it with --resume auto" if resumable else "delete the folder"
        raise SettingsError(f"{folder} holds a run already: {what_to_do}, or choose another <experiment_name>")


def what_is_kept(folder: Path) -> str:
    """For the message of a failure: whether a run has left a checkpoint to resume from."""
    if os.path.lexists(folder / CHECKPOINT) or published(folder):
        return "the last checkpoint is kept: continue with --resume auto"
    return "nothing was saved before"


def describe(name: str, settings: Mapping[str, object]) -> dict[str, object]:
    """What a reader needs to repeat the run: its name, commit, versions, machine, command, settings."""
    return {
        "name": name,
        "cmd": shlex.join(sys.argv),
        "git_commit_id": _git_commit(),
        "versions": versions(),
        "machine": {"host": platform.node(), "cpus": os.cpu_count(), "gpus": torch.cuda.device_count()},
        "settings": settings,
    }


def _git_commit() -> str:
    """The commit of this program's checkout, or [unknown] where it was installed without one."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return "[unknown]"
    return found.stdout.strip() or "[unknown]"


@contextmanager
def output_restored() -> Iterator[None]:
    """Meanwhile a run may print (see `KeptStream`); afterwards stdout, stderr and the log go where they went before."""
    handlers = [h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]
    before, streams = (sys.stdout, sys.stderr), [handler.stream for handler in handlers]
    keep_output()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)
