"""What pre-training logs: its loggers (metrics.jsonl, ...) at every log point, log.txt every epoch, a progress bar.

An evaluation's figures are a row of their own.

Durations come from a monotonic clock; the wall clock, which may jump, is only shown.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from spark_fast.reporting.loggers import Logger, NeverRaises
from spark_fast.reporting.metrics_file import line_of, read_metrics
from spark_fast.reporting.progress_bar import FittingProgress, is_live, text
from spark_fast.streams import KeptStream

T = TypeVar("T")

SUMS = ("loss", "seconds", "wait", "images", "steps", "counted")  # over the steps of an epoch


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
        self.epoch_sums = dict.fromkeys(SUMS, 0.0)
        if folder is None:
            return
        self._take_up(step)
        console = Console(file=KeptStream(sys.__stderr__))  # type: ignore[arg-type]
        epoch, bar, count = text("epoch {task.description}"), BarColumn(None), MofNCompleteColumn()
        loss, speed, wait = (text(f"{{task.fields[{name}]}}") for name in ("loss", "speed", "wait"))
        left = TimeRemainingColumn()
        self.progress = FittingProgress(
            (epoch, bar, count, loss, speed, wait, left),
            first_left_out=(wait, speed, bar, left, loss, count),
            console=console,
            transient=True,
            redirect_stdout=False,  # they are shown above the bar by `_above`, which leaves their copies alone
            redirect_stderr=False,
        )
        at = f"{min(step // steps_per_epoch + 1, epochs)}/{epochs}"
        self.bar = self.progress.add_task(at, total=total_steps, completed=step, loss="", speed="", wait="")
        self.live = is_live(console)
        if self.live:
            self.progress.start()
            self._lines_by(self._above)

    def advance(self, step: int) -> None:
        """One step is done; `step` of the run are."""
        if self.folder is not None and self.live:
            self.progress.update(self.bar, completed=step)

    def point(self, step: int, means: dict[str, float], lr: float, weight_decay: float) -> None:
        """A log point after `step` steps, with the means since the last one (`Monitor.point`)."""
        self._sum(means, means["steps"], means["seconds"])
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
        line = (
            f"epoch {at}  step {step}/{self.total_steps}  loss {loss}  {speed} images/s  "
            f"MFU {means['mfu']:.1%}  data wait {wait}"
        )
        if not self.live:
            print(line, flush=True)
        elif isinstance(sys.stdout, KeptStream):
            sys.stdout.note(f"{line}\n")

    def epoch(self, step: int, notes: dict | None = None) -> None:
        """An epoch is complete after `step` steps; where the figures of its beginning are lost, that is said."""
        sums, of = self.epoch_sums, self.steps_per_epoch
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
            **({"of_its_last_steps": round(sums["steps"])} if sums["steps"] < of else {}),
            "finish": (datetime.now() + remaining).strftime("%Y-%m-%d %H:%M"),
            **(notes or {}),
        }
        self.keep(_append_line, self.folder / "log.txt", row)
        part = f" (over its last {sums['steps']:.0f} of {of} steps)" if sums["steps"] < of else ""
        print(
            f"epoch {row['epoch']} done{part}: loss {row['loss']:.4f}, {row['images_per_second']:.1f} images/s, "
            f"{row['data_wait']:.1%} of the time waiting for data, {remaining} to go",
            flush=True,
        )

    def evaluation(self, step: int, figures: Mapping[str, float], seconds: float) -> None:
        """Percentages by name that an evaluation after `step` steps found, a row of their own, and how long it took."""
        if self.folder is None:
            return
        epoch = step // self.steps_per_epoch
        row = {"step": step, "epoch": epoch, **figures, "eval_seconds": seconds}
        for logger in self.loggers:
            logger.point(row, step, "eval")
        self.keep(_append_line, self.folder / "log.txt", {**row, "epoch": f"{epoch}/{self.epochs}"})
        shown = ", ".join(f"{name} {value:.2f} %" for name, value in figures.items())
        print(f"epoch {epoch}/{self.epochs} evaluated in {seconds:.1f} s: {shown}", flush=True)

    def _sum(self, means: Mapping[str, float], steps: float, seconds: float) -> None:
        """Add a log point's means to the sums of its epoch."""
        counted = steps - means["skipped"]
        self.epoch_sums["loss"] += means["loss"] * counted if counted else 0.0
        self.epoch_sums["counted"] += counted
        self.epoch_sums["seconds"] += seconds
        self.epoch_sums["wait"] += means["data_wait"] * seconds
        self.epoch_sums["images"] += means["images_per_second"] * seconds
        self.epoch_sums["steps"] += steps

    def _take_up(self, step: int) -> None:
        """After a resume in mid-epoch: the sums of the epoch's earlier steps, if metrics.jsonl has them all."""
        assert self.folder is not None
        done = step % self.steps_per_epoch
        try:
            rows = read_metrics(self.folder / "metrics.jsonl") if done else []
        except OSError:
            return
        at: float = step - done
        for row in rows:
            if at < row["step"] <= step and "step_seconds" in row:
                steps = row["step"] - at
                self._sum(row, steps, row["step_seconds"] * steps)
                at = row["step"]
        if at != step:  # rows are missing, and with them steps
            self.epoch_sums = dict.fromkeys(SUMS, 0.0)

    def picture(self, grid: Tensor, step: int) -> None:
        """A picture (3, H, W) uint8 for the loggers that show some."""
        for logger in self.loggers:
            logger.picture(grid, step)

    def close(self) -> None:
        """End the progress bar and the files."""
        if self.folder is not None and self.live:  # else it would print an empty line
            self._lines_by(None)
            self.progress.stop()
        for logger in self.loggers:
            logger.close()

    def _above(self, line: str) -> None:
        self.progress.console.print(Text(line), soft_wrap=True)

    def _lines_by(self, show: Callable[[str], None] | None) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, KeptStream):
                stream.show_lines_by(show)


def _append_line(path: Path, row: Mapping[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line_of(row))
