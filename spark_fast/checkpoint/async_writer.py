"""Checkpoints in the background: a step is held up by a copy to host memory alone, one thread writes it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger("spark_fast")


class AsyncWriter:
    """When a save is due, and the thread that writes it. One write is in flight at most, so memory holds one copy.

    A save that falls due while the disk is still busy is put off to the first point after: a slow disk then costs
    checkpoints in between, never time. Only what must be saved at its very step (the end of an epoch, leaving) waits.

    Args:
        steps, seconds: between saves; 0: not by this.
        begun: the step that this process begins with.
    """

    def __init__(self, steps: int, seconds: float, begun: int) -> None:
        self.steps, self.seconds = steps, seconds
        self._saved, self._since = begun, time.monotonic()
        self._thread: threading.Thread | None = None
        self._failed: Callable[[], None] | None = None

    def due(self, step: int) -> bool:
        """Whether to save now: steps or minutes have passed, and nothing is in flight."""
        by_steps = self.steps > 0 and step // self.steps > self._saved // self.steps
        by_time = self.seconds > 0 and time.monotonic() - self._since >= self.seconds
        return (by_steps or by_time) and not (self._thread is not None and self._thread.is_alive())

    def begin(self, step: int) -> None:
        """Wait for what is in flight and let go of it, before the state of `step` is copied."""
        self.wait()
        self._saved, self._since, self._failed = step, time.monotonic(), None

    def submit(self, write: Callable[[], None]) -> None:
        """Have `write` called by the thread. It must own what it writes: the next step changes the live state."""
        # no daemon: the interpreter waits for it, however it is left
        self._thread = threading.Thread(target=self._run, args=(self._saved, write), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is in flight."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Return when the last save is on disk; one that failed is tried once more.

        Raises:
            CheckpointError: it failed again.
        """
        self.wait()
        if self._failed is not None:
            self._failed()
            self._failed = None

    def _run(self, step: int, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # a full disk must not end the run; `finish` raises what stays broken
            log.error(
                "NOT SAVED at step %d: %s. Training continues, the previous checkpoint is kept, and the next save "
                "tries again. Free some disk space until then",
                step, error,
            )  # fmt: skip
            self._failed = write
