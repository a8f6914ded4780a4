"""Nothing hangs for ever: a run that makes no step for `timeout` seconds says where it stands, and ends (exit code 5).

Each rank has a thread that looks at the rank's own progress and, where there are several ranks, writes a pulse into the
store that torchrun keeps for them. So a rank that waits for another can name it: its pulse has stopped when the process
is dead or frozen, and tells step and activity when it merely hangs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypedDict

import torch.distributed as dist

from spark_fast.errors import STALLED
from spark_fast.streams import KeptStream

PULSE = 0.5  # seconds between two pulses


class Pulse(TypedDict):
    """What a rank tells the others of itself; `count` grows as long as it lives."""

    step: int
    doing: str
    host: str
    pid: int
    count: int


class Watchdog:
    """Watches while it is entered; call `at` as the run goes on.

    Args:
        timeout: seconds without progress after which the process ends.
        store: of torch.distributed, None for a process alone; used by this object's thread and after a failure.
        kept: says what the run has saved.
        prog: the command, for messages.
    """

    def __init__(
        self,
        timeout: float,
        rank: int = 0,
        world_size: int = 1,
        store: dist.Store | None = None,
        kept: Callable[[], str] = lambda: "nothing was saved before",
        prog: str = "spark_fast",
    ) -> None:
        self.timeout, self.rank, self.world_size, self.store, self.kept = timeout, rank, world_size, store, kept
        self.prog = prog
        self._step, self._doing, self._since = 0, "starting", time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, step: int, doing: str) -> None:
        """Progress: `step` steps are done, and this comes now."""
        self._step, self._doing, self._since = step, doing, time.monotonic()

    def __enter__(self) -> Watchdog:
        self._beat(0)  # so that a rank that ends at once is known to be gone
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def lost(self) -> list[str]:
        """Other ranks whose pulse stands still, with where they were last seen. Takes three pulses' time."""
        if self.store is None:
            return []
        before = self._pulses()
        time.sleep(3 * PULSE)
        after = self._pulses()
        if not after:
            return ["the process with the store of the ranks: rank 0, or torchrun"]
        return [
            f"rank {rank} ({pulse['host']}, pid {pulse['pid']}), last heard of at step {pulse['step']}, "
            f"{pulse['doing']}"
            for rank, pulse in after.items()
            if rank != self.rank and before.get(rank) == pulse
        ]

    def _watch(self) -> None:
        count = 0
        while not self._ended.wait(PULSE):
            count += 1
            self._beat(count)
            idle = time.monotonic() - self._since
            if idle > self.timeout:
                self._give_up(idle)

    def _beat(self, count: int) -> None:
        if self.store is None:
            return
        pulse = Pulse(step=self._step, doing=self._doing, host=platform.node(), pid=os.getpid(), count=count)
        with suppress(Exception):  # the store goes with the node that keeps it; the collectives will say so
            self.store.set(f"pulse/{self.rank}", json.dumps(pulse))

    def _pulses(self) -> dict[int, Pulse]:
        found: dict[int, Pulse] = {}
        if self.store is None:
            return found
        for rank in range(self.world_size):
            with suppress(Exception):
                if self.store.check([f"pulse/{rank}"]):
                    found[rank] = json.loads(self.store.get(f"pulse/{rank}"))
        return found

    def _give_up(self, idle: float) -> None:
        where = f"at step {self._step}, {self._doing}"
        told = [f"rank {self.rank} has made no progress for {idle:.0f} s {where} (--timeout {self.timeout:g})"]
        pulses = self._pulses()
        least = min((pulse["step"] for pulse in pulses.values()), default=0)
        behind = [f"rank {rank}, at step {least}, {p['doing']}" for rank, p in pulses.items() if p["step"] == least]
        told += [f"it may be waiting for {other}" for other in self.lost() or behind]
        told += [f"{self.kept()}. Where the threads are:"]
        for line in told:
            print(f"{self.prog}: {line}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        if isinstance(sys.stderr, KeptStream) and sys.stderr.copy is not None:
            faulthandler.dump_traceback(file=sys.stderr.copy, all_threads=True)
        os._exit(STALLED)  # the main thread is stuck, perhaps in a collective: it cannot be asked to leave
