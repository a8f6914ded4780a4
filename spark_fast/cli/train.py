"""The command `spark-fast-train`: settings from the command line, and a run on this rank.

Exit codes: see `spark_fast.errors`.
"""

from __future__ import annotations

import sys

from spark_fast.cli.start import start
from spark_fast.run.command import code_when_stopped, run_command
from spark_fast.run.distributed import Ranks
from spark_fast.run.malloc import keep_heap
from spark_fast.run.watchdog import Watchdog
from spark_fast.training.pretrain import pretrain_from_settings
from spark_fast.training.settings import Settings, parse


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command("spark-fast-train", sys.argv[1:] if argv is None else argv, parse, _run)


def _run(settings: Settings, ranks: Ranks, watchdog: Watchdog) -> int:
    if ranks.device.type == "cpu":
        keep_heap()
    result = pretrain_from_settings(settings, ranks, watchdog)
    return 0 if result.finished else code_when_stopped(result.folder)


if __name__ == "__main__":
    sys.exit(start("train"))
