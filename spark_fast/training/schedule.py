"""Learning rate and weight decay at every step, as published (pretrain/utils/lr_control.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay at every step of a run; for the last three fields see `learning_rate`."""

    peak_lr: float
    warmup_steps: float
    total_steps: int
    weight_decay: float
    weight_decay_end: float
    first: float = 0.005
    last: float = 0.001
    closed: bool = True

    def at(self, step: int) -> tuple[float, float]:
        """Learning rate and weight decay of a step, counted from 0."""
        shape = self.first, self.last, self.closed
        lr = learning_rate(step, self.peak_lr, self.warmup_steps, self.total_steps, *shape)
        return lr, weight_decay(step, self.weight_decay, self.weight_decay_end, self.total_steps)


def learning_rate(
    step: int, peak: float, warmup: float, total: int, first: float = 0.005, last: float = 0.001, closed: bool = True
) -> float:
    """Linear from `first` of the peak over `warmup` steps, then a half cosine to `last` of the peak.

    Args:
        first, last: shares of the peak.
        closed: the half cosine ends at the last step; else one step later.
    """
    warmup = round(warmup)
    if step < warmup:
        return peak * (first + (1 - first) * step / warmup)
    return last * peak + (1 - last) * peak * _half_cosine(step - warmup, total - closed - warmup)


def weight_decay(step: int, start: float, end: float, total: int) -> float:
    """A half cosine from `start` to `end` over the run."""
    return end + (start - end) * _half_cosine(step, total - 1)


def _half_cosine(step: int, last: int) -> float:
    """1 at step 0, 0 at step `last`."""
    return 0.5 + 0.5 * math.cos(math.pi * step / max(1, last))
