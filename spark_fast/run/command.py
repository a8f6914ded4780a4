"""What the commands have in common: settings are parsed, the ranks meet, and every kind of failure has its exit code.

0 done, 2 settings, 3 data, 4 loss not finite, 5 stalled or another rank lost, 6 storage or checkpoint, 75 interrupted
and saved.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

from spark_fast.checkpoint.manager import CheckpointManager, check_space
from spark_fast.errors import LostRankError, SparkFastError, StorageError
from spark_fast.networks import import_from_current_folder
from spark_fast.pipelines import Pipeline, build_pipeline
from spark_fast.run.config import Tree
from spark_fast.run.distributed import Ranks, join
from spark_fast.run.folder import open_run_folder
from spark_fast.run.lock import RunLock
from spark_fast.run.watchdog import Watchdog

S = TypeVar("S", bound=Tree)


def run_command(
    name: str, argv: list[str], parse: Callable[[list[str]], S], run: Callable[[S, Ranks, Watchdog], int]
) -> int:
    """Run a command on these words of its command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    ranks = None
    try:
        settings = parse(argv)
        import_from_current_folder(settings.network)
        ranks = join(settings.run.device, settings.run.timeout)
        if ranks.any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0) and not settings.run.resume:
            logging.getLogger("spark_fast").info("torchrun restarted this run: going on as with --resume auto")
            settings.run.resume = "auto"
        with Watchdog(settings.run.timeout, ranks.rank, ranks.world_size, ranks.store) as watchdog:
            return run(settings, ranks, watchdog)
    except SparkFastError as error:
        return _complain(name, error, error.exit_code)
    except OSError as error:  # metrics or logs: a full disk, a lost mount
        return _complain(
            name,
            RuntimeError(f"{error}; the last checkpoint is kept, go on with --resume auto"),
            StorageError.exit_code,
        )
    finally:
        if ranks is not None:
            ranks.close()


@contextmanager
def running(settings: Tree, ranks: Ranks, watchdog: Watchdog) -> Iterator[tuple[RunLock, ExitStack]]:
    """What frames a run: threads, seed, the lock of its folder (held where it goes on), and a stack of what to close.

    Raises:
        LostRankError: another rank is gone, instead of whatever an exchange fails with.
    """
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    torch.manual_seed(settings.run.seed)
    lock = RunLock(settings.folder)
    dry = getattr(settings.run, "dry_run", False)
    if ranks.main and settings.run.resume and settings.folder.is_dir() and not dry:
        lock.take()  # before anything is read that another run may be changing
    with ExitStack() as closing:
        closing.callback(lock.release)
        try:
            yield lock, closing
        except RuntimeError as error:
            if lost := watchdog.lost():  # signals are still held back: torchrun sends one when it sees the other end
                text = f"rank {ranks.rank} leaves, as another is gone: {'; '.join(lost)}. What was saved is kept"
                raise LostRankError(text) from error
            raise


def open_pipeline(settings: Tree, ranks: Ranks, path: str, **view: Any) -> Pipeline:
    """The images of this rank at a path; `view`: what is seen of them, for `build_pipeline`."""
    return build_pipeline(
        path or None,
        pipeline=settings.data.pipeline,
        input_size=settings.size,
        seed=settings.run.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
        workers=settings.data.workers,
        prefetch=settings.data.prefetch,
        max_bad_fraction=settings.data.max_bad_fraction,
        **view,
    )


def open_store(settings: Tree, lock: RunLock, run: Any, keep_steps: int = 0, pictures: str = "") -> CheckpointManager:
    """The checkpoints of a run (its `step`, `checkpoint_bytes`): the last to open, so that a mistake leaves nothing."""
    check_space(settings.folder, run.checkpoint_bytes, settings.run.keep_last)
    store = CheckpointManager(
        open_run_folder(settings, lock, pictures), keep_last=settings.run.keep_last, keep_steps=keep_steps
    )
    store.clean(run.step)
    return store


def _complain(name: str, error: Exception, code: int) -> int:
    print(f"{name}: {error}", file=sys.stderr, flush=True)
    return code
