"""Where the figures of a run are shown: metrics.jsonl, TensorBoard, Weights & Biases. None of them can stop training.

A logger may fail: a full disk, no network, an error of its own. The log warns once, what the logger could not take is
lost, and it is tried again at the next log point.
"""

from __future__ import annotations

import importlib
import logging
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import ParamSpec, Protocol, TypeVar

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from spark_fast.errors import SettingsError
from spark_fast.reporting.metrics_file import MetricsFile

log = logging.getLogger("spark_fast")

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = 60.0  # seconds that W&B may take to start, and to send the rest at the end


class Logger(Protocol):
    """Takes the figures of log points and evaluations."""

    def point(self, row: Mapping[str, object], step: int, group: str = "train") -> None:
        """The row of `RunLogger.point` after `step` steps, or of `RunLogger.evaluation` (group "eval")."""
        ...

    def picture(self, grid: Tensor, step: int) -> None:
        """A picture (3, H, W) uint8 on the host, after `step` steps."""
        ...

    def close(self) -> None:
        """The run ends."""
        ...


class NeverRaises:
    """Calls functions that may fail: an error makes the call return None; the first one is logged as a warning."""

    def __init__(self, name: str) -> None:
        self._name, self._warned = name, False

    def __call__(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What the action returns, or None if it raises."""
        try:
            return action(*args, **kwargs)
        except Exception as error:
            if not self._warned:
                first = (str(error).strip().splitlines() or [""])[0]
                log.warning(
                    "%s failed (%s: %s); training continues without it", self._name, type(error).__name__, first
                )
            self._warned = True
            return None


class SafeLogger:
    """A logger that never raises. One that cannot be opened logs nothing."""

    def __init__(self, name: str, open_logger: Callable[[], Logger]) -> None:
        self._harmless = NeverRaises(name)
        self._logger: Logger | None = self._harmless(open_logger)

    def point(self, row: Mapping[str, object], step: int, group: str = "train") -> None:
        """As `Logger`."""
        if self._logger is not None:
            self._harmless(self._logger.point, row, step, group)

    def picture(self, grid: Tensor, step: int) -> None:
        """(3, H, W), as `Logger`."""
        if self._logger is not None:
            self._harmless(self._logger.picture, grid, step)

    def close(self) -> None:
        """As `Logger`."""
        if self._logger is not None:
            self._harmless(self._logger.close)


class TensorBoard:
    """Figures as train/<name> and eval/<name>; events of steps that will be run again are hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)  # the first that is hidden

    def point(self, row: Mapping[str, object], step: int, group: str = "train") -> None:
        """As `Logger`."""
        for key, value in row.items():
            if key not in ("step", "epoch"):
                self._writer.add_scalar(f"{group}/{key}", value, step)

    def picture(self, grid: Tensor, step: int) -> None:
        """(3, H, W), as `Logger`."""
        self._writer.add_image("reconstruction", grid, step)

    def close(self) -> None:
        """As `Logger`."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, the same one after a resume: its id is kept in the run folder.

    Server, offline mode and login are set as W&B documents them (WANDB_MODE, WANDB_API_KEY, ...).
    """

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, object]) -> None:
        self._wandb = require_wandb()
        kept = folder / "wandb_id.txt"
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex, encoding="utf-8")
        self._run = self._wandb.init(
            project=project,
            name=name or folder.name,
            id=kept.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=dict(config),
            settings=self._wandb.Settings(init_timeout=PATIENCE, finish_timeout=PATIENCE),
        )

    def point(self, row: Mapping[str, object], step: int, group: str = "train") -> None:
        """As `Logger`."""
        self._run.log({f"{group}/{k}": v for k, v in row.items() if k != "step"}, step=step)

    def picture(self, grid: Tensor, step: int) -> None:
        """(3, H, W), as `Logger`."""
        self._run.log({"reconstruction": self._wandb.Image(grid.permute(1, 2, 0).numpy())}, step=step)

    def close(self) -> None:
        """As `Logger`."""
        self._run.finish()


def require_wandb() -> ModuleType:
    """The module `wandb`; raises SettingsError where it cannot be imported."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise SettingsError(
            f"--wandb needs Weights & Biases, which cannot be imported ({error}): pip install 'spark-fast[wandb]'"
        ) from error


def open_loggers(
    folder: Path | None, step: int, *, wandb: str = "", name: str = "", config: Mapping[str, object] | None = None
) -> list[SafeLogger]:
    """The loggers of a run; none on ranks that do not write (`folder` is None).

    Args:
        step: steps of the run done when this process begins.
        wandb: a project of Weights & Biases, "" for none; `name` and `config` are shown there.
    """
    if folder is None:
        return []
    loggers = [
        SafeLogger("metrics.jsonl", lambda: MetricsFile(folder / "metrics.jsonl", step)),
        SafeLogger("TensorBoard", lambda: TensorBoard(folder, step)),
    ]
    if wandb:
        loggers.append(SafeLogger("Weights & Biases", lambda: WandB(folder, wandb, name, config or {})))
    return loggers
