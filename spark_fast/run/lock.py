"""One run to a folder: two at once would overwrite each other's checkpoints."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from datetime import datetime
from pathlib import Path
from typing import TextIO

from spark_fast.errors import CheckpointError

LOCK = "run.lock"


class RunLock:
    """A lock on a run folder, held until `release` or until this process is gone, however it ended.

    The kernel holds it (flock), so no stale one is ever left; what the file says is only for whoever is refused. Over
    NFS, Linux passes it on to the server as a byte-range lock, so it holds between machines unless the share is mounted
    with `nolock` or `local_lock=flock`: then it holds on each machine alone.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._file: TextIO | None = None

    def take(self) -> None:
        """Take it, or keep it.

        Raises:
            CheckpointError: another run holds it, or the folder cannot be written.
        """
        if self._file is not None:
            return
        try:
            file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"the run folder {self.path.parent} cannot be written: {error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "it is just starting"
            file.close()
            raise CheckpointError(
                f"the run folder {self.path.parent} is in use by another run ({holder}): wait for it, stop it, or "
                f"choose another folder"
            ) from None
        except OSError as error:
            file.close()
            raise CheckpointError(f"{self.path} cannot be locked: {error}") from error
        file.truncate(0)
        started = datetime.now().isoformat(timespec="seconds")
        file.write(json.dumps({"pid": os.getpid(), "host": platform.node(), "started": started}))
        file.flush()
        self._file = file

    def release(self) -> None:
        """Let go; the file stays, as removing it would race with the next run."""
        if self._file is not None:
            self._file.close()
            self._file = None
