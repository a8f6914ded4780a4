"""The figures of a run between its log points: losses, gradient norms, times, and use of the device.

Losses stay on the device between log points. The host waits for the device only where it reads them, at a log point.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from spark_fast.reporting.loss_spikes import Spikes
from spark_fast.reporting.mfu import MfuMeter
from spark_fast.reporting.profiler import Profile
from spark_fast.reporting.step_timer import StepClock

T = TypeVar("T")


class StepLogger(Protocol):
    """Shows the figures of a run."""

    def advance(self, step: int) -> None:
        """`step` steps of the run are done."""
        ...

    def point(self, step: int, means: dict[str, float], lr: float, weight_decay: float) -> None:
        """A log point after `step` steps, with the means since the last one."""
        ...

    def close(self) -> None:
        """The run ends."""
        ...


class Meter:
    """Sums over the steps since the last reading."""

    def __init__(self) -> None:
        self.loss, self.finite = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        self.grad_norm = torch.tensor(math.nan)
        self.steps, self.wait = 0, 0.0
        self.since = time.perf_counter()

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Count one step by its loss and gradient norm, scalars on the device, without a host sync.

        A step where one of them is not finite was skipped, and is left out of the means.
        """
        finite = loss.isfinite() & grad_norm.isfinite()
        self.loss = self.loss.to(loss.device) + torch.where(finite, loss, 0.0)
        self.finite = self.finite.to(loss.device) + finite
        self.grad_norm = torch.where(finite, grad_norm, self.grad_norm.to(loss.device))
        self.steps += 1

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass batches on, counting the seconds spent waiting for them."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.wait += time.perf_counter() - asked
            yield batch

    def read(self, images_per_step: int, mean_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the last reading, and start over. Synchronises host and device.

        `mean_over_ranks` is given a scalar on the device.
        """
        loss = mean_over_ranks(self.loss / self.finite).item()
        norm = self.grad_norm.item()  # the same on every rank
        seconds = time.perf_counter() - self.since
        means = {
            "loss": loss,
            "grad_norm": norm,
            "images_per_second": self.steps * images_per_step / seconds,
            "data_wait": self.wait / seconds,
            "seconds": seconds,
            "steps": self.steps,
            "skipped": self.steps - int(self.finite),
        }
        self.loss, self.finite, self.steps = torch.zeros(()), torch.zeros((), dtype=torch.int64), 0
        self.wait, self.since = 0.0, time.perf_counter()
        return means


class Monitor:
    """Collects the figures of every step and hands their means to a logger at log points.

    Args:
        images_per_step: over all ranks.
        clock: of the step's phases.
        rates: (learning rate, weight decay) of a step, counted from 0.
        mean_over_ranks: the mean of a tensor of any shape over the ranks, on the device.
        mfu, spikes, profile: None: MFU is not measured, spikes are not looked for, no profile is taken.
    """

    def __init__(
        self,
        logger: StepLogger,
        *,
        images_per_step: int,
        clock: StepClock,
        rates: Callable[[int], tuple[float, float]],
        mean_over_ranks: Callable[[Tensor], Tensor],
        mfu: MfuMeter | None = None,
        spikes: Spikes | None = None,
        profile: Profile | None = None,
    ) -> None:
        self.logger, self.images_per_step, self.clock, self.rates = logger, images_per_step, clock, rates
        self.mean_over_ranks, self.mfu, self.spikes, self.profile = mean_over_ranks, mfu, spikes, profile
        self.meter = Meter()
        self.last: dict[str, float] = {}  # the figures of the last log point

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass the batches of an epoch on, counting the seconds spent waiting for them."""
        self.meter = Meter()  # what passed between two epochs counts for neither
        return self.meter.timed(batches)

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, ids: Tensor) -> None:
        """Step number `step`, from 1, is done: loss and gradient norm, scalars on the device, and sample ids, (B,)."""
        self.meter.add(loss, grad_norm)
        if self.spikes is not None:
            self.spikes.add(loss, ids)
        self.logger.advance(step)
        if self.profile is not None:
            self.profile.advance()

    def point(self, step: int, before: float) -> float:
        """Log the means since the last point, on all ranks together; `step` steps are done.

        Returns:
            the mean loss; `before` where all steps were skipped.
        """
        means = self.read()
        if self.spikes is not None:
            self.spikes.report(step, self.mean_over_ranks)
        lr, weight_decay = self.rates(step - 1)
        self.last = {"step": step, "lr": lr, "weight_decay": weight_decay, **means}
        self.logger.point(step, means, lr, weight_decay)
        return means["loss"] if means["skipped"] < means["steps"] else before

    def read(self) -> dict[str, float]:
        """The means since the last reading, with where a step's seconds went. Synchronises host and device."""
        means = self.meter.read(self.images_per_step, self.mean_over_ranks)
        phases = {"data": means["data_wait"] * means["seconds"], **self.clock.read(), "step": means["seconds"]}
        means |= {f"{name}_seconds": value / means["steps"] for name, value in phases.items()}
        return means | (self.mfu.read(means["images_per_second"]) if self.mfu is not None else {})

    def close(self) -> None:
        """The run ends."""
        if self.profile is not None:
            self.profile.close()
        self.logger.close()
