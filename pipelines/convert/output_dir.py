"""The folder that a conversion writes to: it is locked, and a failure to write says what is kept."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spark_fast.errors import StorageError

logger = logging.getLogger("spark_fast.pipelines")


@contextmanager
def storage(dst: Path) -> Iterator[None]:
    """Turn an OSError meanwhile into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageError(
            f"writing to {dst} failed: {'the disk is full' if full else error}. Finished shards are kept:"
            f" {'free some space' if full else 'repair the storage'} and run the same command again."
        ) from error


@contextmanager
def locked(dst: Path, part: str = "") -> Iterator[None]:
    """Keep other conversions out of a folder, which is made if need be. Parts, by name, share it: a part keeps out
    itself and those who want the whole.

    Raises StorageError when someone else is there.
    """
    dst.mkdir(parents=True, exist_ok=True)
    locks = [(dst, os.O_RDONLY, fcntl.LOCK_SH if part else fcntl.LOCK_EX)]
    if part:
        locks.append((dst / f"{part}.lock", os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX))
    opened = []
    try:
        for path, flags, kind in locks:
            opened.append(os.open(path, flags, 0o666))
            _lock(opened[-1], dst, kind)
        yield
    finally:
        for file in opened:
            os.close(file)


def _lock(file: int, dst: Path, kind: int) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)  # gone with the process, however it ends
    except BlockingIOError:
        raise StorageError(f"another conversion is writing to {dst}: wait for it, or stop it") from None
    except OSError:
        logger.warning("%s cannot be locked: make sure that only one conversion writes there", dst)
