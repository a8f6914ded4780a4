"""Evaluations between the epochs of a run, which they do not change: when one is due, and that each is done once.

The measurement is passed in (`Evaluator`), because evaluation imports training, not the reverse.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import nn

from spark_fast.errors import DataError
from spark_fast.reporting.metrics_file import read_metrics
from spark_fast.reporting.run_logger import RunLogger
from spark_fast.run.distributed import Ranks
from spark_fast.run.signals import Interrupt
from spark_fast.run.watchdog import Watchdog
from spark_fast.training.run_state import Position


class Evaluator(Protocol):
    """Measures a network on labelled images; every method is called on all ranks together."""

    about: str  # what is measured, on which images

    def measure(self, network: nn.Module) -> dict[str, float]:
        """Percentages by name, the same on every rank. The network, which is in training, is left as it is."""
        ...

    def unreadable(self) -> list[str]:
        """The first few images that could not be read, each with the reason."""
        ...

    def close(self) -> None:
        """Stop threads and close files."""
        ...


class StoppedError(Exception):
    """All ranks abandon an evaluation, because one of them was told to stop."""


def stoppable(position: Position, ranks: Ranks, watchdog: Watchdog, interrupt: Interrupt) -> Callable[[int], None]:
    """What an evaluation calls before each batch, on all ranks together; raises StoppedError."""

    def alive(batch: int) -> None:
        watchdog.at(position.step, "evaluating")
        if ranks.any(interrupt.asked):
            raise StoppedError

    return alive


class OnlineEvaluation:
    """Evaluates before the first step, every `every` epochs and after the last; called at the end of each epoch.

    The run has been saved by then, so an evaluation that is abandoned or killed is repeated after the resume.
    metrics.jsonl tells which ones are done.

    Args:
        network: of the encoder.
        folder: the run folder, None on ranks that do not write.

    Attributes:
        last: the newest figures.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        network: nn.Module,
        position: Position,
        every: int,
        *,
        logger: RunLogger,
        ranks: Ranks,
        watchdog: Watchdog,
        folder: Path | None,
    ) -> None:
        self.evaluator, self.network, self.position, self.every = evaluator, network, position, every
        self.logger, self.ranks, self.watchdog, self.folder = logger, ranks, watchdog, folder
        self.last: dict[str, float] = {}

    def __call__(self) -> bool:
        """See `trainer.BetweenEpochs`.

        Raises:
            DataError: before the first step of this process: some images cannot be read.
        """
        at = self.position
        due = at.epoch % self.every == 0 or at.step == at.total_steps
        if not due or self.ranks.any(self._is_done()):
            return False
        begun = time.perf_counter()
        try:
            figures = self.evaluator.measure(self.network)
        except StoppedError:
            return True
        if at.step == at.begun and (names := self.evaluator.unreadable()):
            raise DataError(
                f"labelled images of --val_path cannot be read, and figures with others in their place would mislead: "
                f"{'; '.join(names)}. Repair or remove them"
            )
        self.last = figures
        self.logger.evaluation(at.step, figures, time.perf_counter() - begun)
        self.watchdog.at(at.step, "waiting for data")
        return False

    def _is_done(self) -> bool:
        """Whether an earlier process has done it; of this one's own steps none has."""
        if self.folder is None or self.position.step > self.position.begun:
            return False
        try:
            rows = read_metrics(self.folder / "metrics.jsonl")
        except OSError:
            return False
        return any(row["step"] == self.position.step and "eval_seconds" in row for row in rows)
