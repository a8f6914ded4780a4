"""What the commands have in common: settings are parsed, the ranks meet, and every kind of failure has its exit code.

0 done, 2 settings, 3 data, 4 loss not finite, 5 stalled or another rank lost, 6 storage or checkpoint, 75 interrupted
and saved.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro

from pipelines import DataError
from spark_fast.training.bad_steps import NotFiniteError
from spark_fast.training.checkpoint import CheckpointError
from spark_fast.training.distributed import Ranks, join
from spark_fast.training.run_folder import RunSettings
from spark_fast.training.settings_tree import SettingsError
from spark_fast.training.watchdog import STALLED, LostRankError, Watchdog

S = TypeVar("S", bound=RunSettings)


def run_command(
    name: str, argv: list[str], parse: Callable[[list[str]], S], run: Callable[[S, Ranks, Watchdog], int]
) -> int:
    """Run a command on these words of its command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    ranks = None
    try:
        settings = parse(argv)
        ranks = join(settings.run.device, settings.run.timeout)
        if ranks.any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0) and not settings.run.resume:
            logging.getLogger("spark_fast").info("torchrun restarted this run: going on as with --resume auto")
            settings.run.resume = "auto"
        with Watchdog(settings.run.timeout, ranks.rank, ranks.world_size, ranks.store) as watchdog:
            return run(settings, ranks, watchdog)
    except SettingsError as error:
        return _complain(name, error, 2)
    except DataError as error:
        return _complain(name, error, 3)
    except NotFiniteError as error:
        return _complain(name, error, 4)
    except LostRankError as error:
        return _complain(name, error, STALLED)
    except CheckpointError as error:
        return _complain(name, error, 6)
    except OSError as error:  # metrics or logs: a full disk, a lost mount
        return _complain(name, RuntimeError(f"{error}; the last checkpoint is kept, go on with --resume auto"), 6)
    finally:
        if ranks is not None:
            ranks.close()


def run_tool(tool: Callable[..., int], argv: list[str] | None = None) -> int:
    """Run a function of tools/ on a command line, which tyro reads by its signature; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    file = Path(inspect.getfile(tool))
    codes = {SettingsError: 2, DataError: 3, CheckpointError: 6, OSError: 6}
    try:
        about = inspect.getdoc(inspect.getmodule(tool))
        return tyro.cli(tool, args=argv, use_underscores=True, prog=file.name, description=about)
    except tuple(codes) as error:
        return _complain(file.stem, error, next(code for kind, code in codes.items() if isinstance(error, kind)))


def _complain(name: str, error: Exception, code: int) -> int:
    print(f"{name}: {error}", file=sys.stderr, flush=True)
    return code
