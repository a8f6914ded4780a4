"""What pre-training tells: its loggers (metrics.jsonl, ...) at every log point, log.txt every epoch, a progress bar.

Durations come from a monotonic clock; the wall clock, which may jump, is only shown.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
from torch import Tensor

from spark_fast.reporting.loggers import Logger, NeverRaises
from spark_fast.reporting.metrics_file import line_of
from spark_fast.reporting.progress_bar import FittingProgress, is_live, text

T = TypeVar("T")


class RunLogger:
    """Writes what a run tells; on ranks other than the first it does nothing.

    Args:
        folder: the run folder, None on ranks that do not write.
        total_steps, steps_per_epoch, epochs: of the run; `step`: where this process begins.
        loggers: what shows the figures, see `open_loggers`.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        total_steps: int,
        steps_per_epoch: int,
        epochs: int,
        step: int,
        loggers: Sequence[Logger] = (),
    ) -> None:
        self.folder, self.epochs, self.loggers = folder, epochs, loggers
        self.keep = NeverRaises("log.txt")
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.rate = 0.0  # seconds per step, smoothed
        self.epoch_sums = {"loss": 0.0, "seconds": 0.0, "wait": 0.0, "images": 0.0, "steps": 0.0, "counted": 0.0}
        if folder is None:
            return
        console = Console(file=sys.__stderr__)
        epoch, bar, count = text("epoch {task.description}"), BarColumn(None), MofNCompleteColumn()
        loss, speed, wait = (text(f"{{task.fields[{name}]}}") for name in ("loss", "speed", "wait"))
        left = TimeRemainingColumn()
        self.progress = FittingProgress(
            (epoch, bar, count, loss, speed, wait, left),
            first_left_out=(wait, speed, bar, left, loss, count),
            console=console,
            transient=True,
        )
        at = f"{min(step // steps_per_epoch + 1, epochs)}/{epochs}"
        self.bar = self.progress.add_task(at, total=total_steps, completed=step, loss="", speed="", wait="")
        self.live = is_live(console)
        if self.live:
            self.progress.start()

    def advance(self, step: int) -> None:
        """One step is done; `step` of the run are."""
        if self.folder is not None and self.live:
            self.progress.update(self.bar, completed=step)

    def point(self, step: int, means: dict[str, float], lr: float, weight_decay: float) -> None:
        """A log point after `step` steps, with the means since the last one (`Monitor.point`)."""
        counted = means["steps"] - means["skipped"]
        self.epoch_sums["loss"] += means["loss"] * counted if counted else 0.0
        self.epoch_sums["counted"] += counted
        self.epoch_sums["seconds"] += means["seconds"]
        self.epoch_sums["wait"] += means["data_wait"] * means["seconds"]
        self.epoch_sums["images"] += means["images_per_second"] * means["seconds"]
        self.epoch_sums["steps"] += means["steps"]
        latest = means["seconds"] / means["steps"]
        self.rate = latest if self.rate == 0 else 0.7 * self.rate + 0.3 * latest
        if self.folder is None:
            return
        epoch = (step - 1) // self.steps_per_epoch + 1
        row = {"step": step, "epoch": epoch, "lr": lr, "weight_decay": weight_decay}
        row |= {key: value for key, value in means.items() if key not in ("seconds", "steps")}
        for logger in self.loggers:
            logger.point(row, step)
        at, loss = f"{epoch}/{self.epochs}", f"{means['loss']:.4f}"
        speed, wait = f"{means['images_per_second']:.1f}", f"{means['data_wait']:.1%}"
        self.progress.update(
            self.bar,
            completed=step,
            description=at,
            loss=f"loss {loss}",
            speed=f"{speed} images/s",
            wait=f"wait {wait}",
        )
        if not self.live:
            print(
                f"epoch {at}  step {step}/{self.total_steps}  loss {loss}  {speed} images/s  "
                f"MFU {means['mfu']:.1%}  data wait {wait}",
                flush=True,
            )

    def epoch(self, step: int, notes: dict | None = None) -> None:
        """An epoch, or this process's part of it, is complete after `step` steps."""
        sums = self.epoch_sums
        self.epoch_sums = dict.fromkeys(sums, 0.0)
        if self.folder is None or sums["steps"] == 0:
            return
        remaining = timedelta(seconds=round((self.total_steps - step) * self.rate))
        row = {
            "epoch": f"{step // self.steps_per_epoch}/{self.epochs}",
            "step": step,
            "loss": sums["loss"] / sums["counted"] if sums["counted"] else math.nan,
            "images_per_second": sums["images"] / sums["seconds"],
            "data_wait": sums["wait"] / sums["seconds"],
            "remaining": str(remaining),
            "finish": (datetime.now() + remaining).strftime("%Y-%m-%d %H:%M"),
            **(notes or {}),
        }
        self.keep(_append_line, self.folder / "log.txt", row)
        print(
            f"epoch {row['epoch']} done: loss {row['loss']:.4f}, {row['images_per_second']:.1f} images/s, "
            f"{row['data_wait']:.1%} of the time waiting for data, {remaining} to go",
            flush=True,
        )

    def picture(self, grid: Tensor, step: int) -> None:
        """A picture (3, H, W) uint8 for the loggers that show some."""
        for logger in self.loggers:
            logger.picture(grid, step)

    def close(self) -> None:
        """End the progress bar and the files."""
        if self.folder is not None and self.live:  # else it would print an empty line
            self.progress.stop()
        for logger in self.loggers:
            logger.close()


def _append_line(path: Path, row: Mapping[str, object]) -> None:
    with path.open("a") as file:
        file.write(line_of(row))
