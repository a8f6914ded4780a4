"""Warns of a finite loss that jumps, within a log interval, with the samples of the batch.

The rule: a step's loss is a spike if it lies above

    median + 6 * deviation      of the last 100 losses, once there are 20

where the deviation is 1.4826 times the median distance from the median, and at least half a percent of the median. For
normally distributed losses that is the standard deviation, and the spikes themselves do not move it. A loss that stays
high moves the median after 50 steps and is then no spike any more.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable
from statistics import median

import torch
from torch import Tensor

log = logging.getLogger("spark_fast")

WINDOW, ENOUGH = 100, 20  # losses
DEVIATIONS = 6.0
SMALLEST = 0.005  # of the median


def limit(losses: Iterable[float]) -> float:
    """The loss above which one is a spike; infinite while there are too few losses."""
    losses = list(losses)
    if len(losses) < ENOUGH:
        return math.inf
    middle = median(losses)
    deviation = 1.4826 * median(abs(x - middle) for x in losses)
    return middle + DEVIATIONS * max(deviation, SMALLEST * abs(middle))


class Spikes:
    """Collects losses and sample ids between log points, and judges them there."""

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._losses: list[Tensor] = []
        self._ids: list[Tensor] = []

    def add(self, loss: Tensor, ids: Tensor) -> None:
        """Count one step: its loss, a scalar on the device, and the ids (B,) of this rank's images, on the host."""
        self._losses.append(loss)
        self._ids.append(ids)

    def report(self, step: int, mean_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Warn of the worst spike since the last report, if there was one. Synchronises host and device.

        Args:
            step: steps of the run done.
            mean_over_ranks: the mean of (steps,) losses over the ranks, on the device.
        """
        if not self._losses:
            return
        losses = mean_over_ranks(torch.stack(self._losses)).tolist()
        found = []
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                continue  # `NonfiniteReport` tells of it
            allowed = limit(self._window)
            if loss > allowed:
                found.append((loss, allowed, len(self._window), i))
            self._window.append(loss)
        if found:
            loss, allowed, window, i = max(found)
            others = f" and {len(found) - 1} more steps since the last log point" if found[1:] else ""
            log.warning(
                "the loss jumped to %.4f at step %d%s; the last %d steps set the limit at %.4f. "
                "This rank's samples in that step: %s",
                loss, step - len(losses) + i + 1, others, window, allowed, ", ".join(map(str, self._ids[i].tolist())),
            )  # fmt: skip
        self._losses, self._ids = [], []
