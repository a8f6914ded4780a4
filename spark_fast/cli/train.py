"""The command `spark-fast-train`, and the same from Python: settings, and a run on this rank.

Exit codes: see `spark_fast.errors`.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from spark_fast.cli.start import start
from spark_fast.evaluation.online_knn import OnlineKnn
from spark_fast.run.command import code_when_stopped, on_ranks, run_command
from spark_fast.run.distributed import Ranks
from spark_fast.run.malloc import keep_heap
from spark_fast.run.run_folder import output_restored
from spark_fast.run.watchdog import Watchdog
from spark_fast.training.pretrain import PretrainResult, pretrain_from_settings
from spark_fast.training.settings import Settings, parse


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command("spark-fast-train", sys.argv[1:] if argv is None else argv, parse, _run)


def pretrain(data_path: str | Path = "", **settings: object) -> PretrainResult:
    """Pre-train from a script, a notebook or a thread; the same as the command `spark-fast-train`.

    Args:
        data_path: the images.
        settings: any setting of the command by its name, e.g. model="convnext_tiny", epochs=100, exp_name="mine",
            resume="auto"; input_size may be a number or (H, W). docs/reference/settings.md lists them.

    Under torchrun every rank makes the same call. Outside the main thread no signal handlers are installed.

    Raises:
        SettingsError, DataError, CheckpointError, NotFiniteError, ...: see `spark_fast.errors`.
        TypeError: a name that is no setting, with the nearest ones.
    """
    chosen = Settings.from_names(data_path=data_path, **settings)
    with output_restored():
        return on_ranks(chosen, partial(pretrain_from_settings, open_evaluator=OnlineKnn))


def _run(settings: Settings, ranks: Ranks, watchdog: Watchdog) -> int:
    if ranks.device.type == "cpu":
        keep_heap()
    result = pretrain_from_settings(settings, ranks, watchdog, OnlineKnn)
    return 0 if result.finished else code_when_stopped(result.folder)


if __name__ == "__main__":
    sys.exit(start("train"))
