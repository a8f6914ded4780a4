"""A first signal to leave lets the step in flight finish and saves; a second one ends the process."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from contextlib import suppress

from spark_fast.run.distributed import is_first_rank

log = logging.getLogger("spark_fast")


class Interrupt:
    """Remembers a first signal to leave, so that the step in flight is finished; a second one ends the process.

    The same within a second counts once: a scheduler signals torchrun and its processes, and torchrun passes it on.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Slurm sends the last one before the time is up

    def __init__(self) -> None:
        self.asked, self._since = False, 0.0
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._remember) for s in self.SIGNALS}
        else:  # Python lets only the main thread handle signals
            self._before = {}
            log.info("not in the main thread: Ctrl-C and signals do not stop this run; use --max_steps")

    def _remember(self, number: int, frame: object) -> None:
        if not self.asked:
            self.asked, self._since = True, time.monotonic()
            if is_first_rank():
                with suppress(OSError):  # not by print: the signal may have come in the middle of one
                    os.write(2, b"\nfinishing the step and saving; the next signal ends the run at once\n")
            return
        if time.monotonic() - self._since < 1:
            return
        for each in self.SIGNALS:  # at once, even while the last write hangs
            signal.signal(each, signal.SIG_DFL)
        signal.raise_signal(number)

    def release(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
