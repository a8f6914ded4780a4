"""The loop of a run, the same for pre-training and fine-tuning: steps, log points, saves, and how a run is left.

What differs is passed in: the step, and what happens at the end of an epoch besides the save.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from torch import Tensor

from spark_fast.pipelines import Batch, Pipeline
from spark_fast.reporting.monitor import Monitor
from spark_fast.run.distributed import Ranks
from spark_fast.run.run_folder import STOPPED
from spark_fast.run.signals import Interrupt
from spark_fast.run.watchdog import Watchdog
from spark_fast.training.checkpointer import Checkpointer
from spark_fast.training.nonfinite import NonfiniteReport

log = logging.getLogger("spark_fast")

Step = Callable[[int, Batch], tuple[Tensor, Tensor]]  # step, batch -> loss and gradient norm, scalars on the device
EpochEnd = Callable[[Callable[[], None]], None]  # is given what saves the run, and calls it
BetweenEpochs = Callable[[], bool]  # True on all ranks: it was told to stop


class Trainer:
    """Drives a step through the epochs of a run.

    Args:
        step: advances the model by one batch.
        batches: of this rank, in the order that (seed, epoch) gives.
        checkpointer: has the state of the run, and with it its position.
        end_of_epoch: logs, evaluates, draws; it calls the function that it is given to save.
        between_epochs: called before the first step and after each `end_of_epoch`, also where a run is resumed
            there; when it is stopped, the run is left and a resume calls it again.
        log_every: steps between log points.
        max_steps: leave after so many steps of this process, as at an interruption; 0: never.
        folder: of the run, None on ranks that do not write.
    """

    def __init__(
        self,
        step: Step,
        batches: Pipeline,
        checkpointer: Checkpointer,
        *,
        monitor: Monitor,
        nonfinite: NonfiniteReport,
        end_of_epoch: EpochEnd,
        ranks: Ranks,
        watchdog: Watchdog,
        interrupt: Interrupt,
        log_every: int,
        between_epochs: BetweenEpochs = lambda: False,
        max_steps: int = 0,
        folder: Path | None = None,
    ) -> None:
        self.step, self.batches, self.checkpointer, self.monitor = step, batches, checkpointer, monitor
        self.nonfinite, self.end_of_epoch, self.between_epochs = nonfinite, end_of_epoch, between_epochs
        self.ranks, self.watchdog, self.interrupt = ranks, watchdog, interrupt
        self.log_every, self.max_steps, self.folder = log_every, max_steps, folder
        self.position = checkpointer.state.position

    def train(self) -> bool:
        """Train to the last epoch: True; or until interrupted: False, and the checkpoint is written.

        Raises:
            NotFiniteError: loss or gradient are not finite; weights and last checkpoint are good.
            CheckpointError: the last checkpoint could not be written, twice.
        """
        at = self.position
        try:
            leaving = at.at_epoch_end and self.between_epochs()
            if leaving:
                self._save()  # this process has not yet
            while not leaving and at.step < at.total_steps:
                leaving = self._train_epoch() and at.step < at.total_steps
                if at.at_epoch_end:
                    self.end_of_epoch(self._save)
                    leaving = self.between_epochs() or leaving
            self.checkpointer.finish()
            if leaving:
                self._tell_of_the_stop()
        finally:
            self.checkpointer.wait()  # whatever the reason for leaving, a write in flight is finished
            self.monitor.close()
        return not leaving

    def _train_epoch(self) -> bool:
        """The steps of this epoch that are still to do; True when the run is to be left."""
        at, leaving = self.position, False
        epoch, done = divmod(at.step, at.steps_per_epoch)
        with closing(self.batches.epoch(epoch, done)) as batches:  # closing stops what is being decoded ahead
            for batch in self.monitor.timed(batches):
                self.watchdog.at(at.step, "in the step")
                loss, norm = self.step(at.step, batch)
                self.nonfinite.add(batch.ids)
                at.step += 1
                self.monitor.add(at.step, loss, norm, batch.ids)
                limit = 0 < self.max_steps <= at.step - at.begun
                leaving = self.ranks.any(self.interrupt.asked or limit)
                self._after_step(leaving)
                self.watchdog.at(at.step, "waiting for data")
                if leaving or at.at_epoch_end:
                    break
        return leaving

    def _after_step(self, leaving: bool) -> None:
        """Look at skipped steps, log and save, where it is time to; on all ranks together."""
        at, every = self.position, self.checkpointer.steps
        save_point = every > 0 and at.step % every == 0
        log_point = at.at_epoch_end or leaving or save_point or at.step % self.log_every == 0
        if log_point or self.ranks.device.type == "cpu":  # there it costs nothing to look
            self.nonfinite.report(at.step, self.folder)
        if not log_point:
            return
        at.loss = self.monitor.point(at.step, at.loss)  # before a save: nothing broken is kept
        due = self.ranks.any(self.checkpointer.due())
        if not at.at_epoch_end and (leaving or (due and not self.nonfinite.in_a_row)):
            self._save()

    def _save(self) -> None:
        self.watchdog.at(self.position.step, "saving")
        self.checkpointer.save()

    def _tell_of_the_stop(self) -> None:
        if self.folder is None:
            return
        at = self.position
        text = f"stopped at step {at.step} of {at.total_steps}; saved {self.checkpointer.last}. "
        text += "Continue with the same command and --resume auto"
        print(text, flush=True)
        try:
            (self.folder / STOPPED).write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            log.warning("%s could not be written: %s", self.folder / STOPPED, error)
