"""Where the time of a step goes: forward, backward and optimiser, measured on the device without waiting for it.

On a GPU the host runs ahead, so its own clock says nothing of a phase. Events are put into the device's queue instead
and are read at a log point, where the host waits in any case. Times between them are the device's, with whatever it
idles while the host is late; under data parallelism the exchange of gradients belongs to backward.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

PHASES = ("forward", "backward", "optimizer")
GRAPH = "graph"  # the phases of a captured step, which cannot be told apart


class StepClock:
    """Sums the seconds of each phase over the steps, and over the parts of a step, since the last reading."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str | None, Any]] = []
        self._stopped = False

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Marks made here are ignored: while a step is captured no time passes on the device."""
        self._stopped = True
        try:
            yield
        finally:
            self._stopped = False

    def mark(self, phase: str | None) -> None:
        """The phase before ends here and this one begins; None after the last one of a step."""
        if self._stopped:
            return
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
            self._marks.append((phase, now))
        else:
            self._marks.append((phase, time.perf_counter()))

    def read(self) -> dict[str, float]:
        """Seconds of every phase since the last reading, and start over. Synchronises host and device.

        `graph` is among them only where a step was replayed.
        """
        if self._cuda and self._marks:
            self._marks[-1][1].synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in pairwise(self._marks):
            if phase is not None:
                took = begin.elapsed_time(end) / 1000 if self._cuda else end - begin
                seconds[phase] = seconds.get(phase, 0.0) + took
        self._marks.clear()
        return seconds
