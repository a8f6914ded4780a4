"""What the commands have in common: settings are parsed, the ranks meet, and every kind of failure has its exit code.

0 done, 2 settings, 3 data, 4 loss not finite, 5 stalled or another rank lost, 6 storage or checkpoint, 75 interrupted
and saved (0 under torchrun), 130 Ctrl-C before there was anything to save.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from spark_fast.checkpoint.manager import CheckpointManager, check_space
from spark_fast.errors import CTRL_C, INTERRUPTED, LostRankError, SparkFastError, StorageError
from spark_fast.networks import import_from_current_folder
from spark_fast.pipelines import LoaderOptions, Pipeline, build_pipeline
from spark_fast.pipelines.build import measure_statistics
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from spark_fast.run.agreement import check_images, check_settings
from spark_fast.run.config import Tree
from spark_fast.run.distributed import Ranks, is_first_rank, join
from spark_fast.run.lock import RunLock
from spark_fast.run.run_folder import STOPPED, describe, open_run_folder, refuse_another_run, what_is_kept
from spark_fast.run.watchdog import Watchdog
from spark_fast.streams import keep_output

log = logging.getLogger("spark_fast")

S = TypeVar("S", bound=Tree)
T = TypeVar("T")


def run_command(
    name: str, argv: list[str], parse: Callable[[list[str]], S], run: Callable[[S, Ranks, Watchdog], int]
) -> int:
    """Run a command on these words of its command line; returns the exit code."""
    keep_output()
    logging.basicConfig(
        level=logging.INFO if is_first_rank() else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    folder = Path()
    try:
        settings = parse(argv)
        folder = settings.folder
        import_from_current_folder(settings.network)
        return on_ranks(settings, run)
    except SparkFastError as error:
        return _complain(name, error, error.exit_code)
    except KeyboardInterrupt:  # before training or after it: in between `signals.Interrupt` has the signal
        return _complain(name, f"interrupted; {what_is_kept(folder)}", CTRL_C)
    except OSError as error:  # metrics or logs: a full disk, a lost mount
        return _complain(name, f"{error}; {what_is_kept(folder)}", StorageError.exit_code)


def on_ranks(settings: S, run: Callable[[S, Ranks, Watchdog], T]) -> T:
    """Join the ranks that torchrun started, or stand alone, and run under a watchdog; returns what `run` does."""
    ranks = join(settings.run.device, settings.run.timeout)
    try:
        if ranks.any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0) and not settings.run.resume:
            log.info("torchrun restarted this run: it resumes as with --resume auto")
            settings.resume_newest()
        check_settings(ranks, settings)
        kept = partial(what_is_kept, settings.folder)
        with Watchdog(settings.run.timeout, ranks.rank, ranks.world_size, ranks.store, kept, settings.prog) as watchdog:
            return run(settings, ranks, watchdog)
    finally:
        ranks.close()


def code_when_stopped(folder: Path) -> int:
    """The exit code of a run that was told to stop and has saved.

    Under torchrun it is 0: any other is a failure there, and the run would be started again to take as many steps more.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return INTERRUPTED
    log.info("exit code 0 for torchrun; %s marks the run as unfinished", folder / STOPPED)
    return 0


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
                kept = what_is_kept(settings.folder)
                text = f"rank {ranks.rank} exits because another rank is gone: {'; '.join(lost)}; {kept}"
                raise LostRankError(text) from error
            raise


def open_pipeline(
    settings: Tree,
    ranks: Ranks,
    path: str,
    options: LoaderOptions,
    kept: Callable[[], Statistics | None] = lambda: None,
) -> Pipeline:
    """The images of this rank at a path: `options`, with what every command's settings say about loading.

    Args:
        options: with `statistics`, images are scaled as for these unless the settings say otherwise.
        kept: the statistics to go on with, None without any; asked where images are no photographs. The first rank
            measures them where there are none.
    """
    statistics = options.statistics
    asked = replace(
        options,
        pipeline=settings.data.pipeline,
        input_size=settings.size,
        in_chans=settings.in_chans,
        seed=settings.run.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
        workers=settings.data.workers,
        worker_processes=settings.data.worker_processes,
        prefetch=settings.data.prefetch,
        max_bad_fraction=settings.data.max_bad_fraction,
        max_pixels=settings.data.max_pixels,
        cache_dir=settings.data.cache_dir,
        cache_size=settings.data.cache_size,
        scaling=settings.scaling(statistics),
        mean=settings.data.mean,
        std=settings.data.std,
        channels_first=settings.data.channels_first,
        npz_key=settings.data.npz_key,
    )
    if statistics is None and not asked.photographs:
        statistics = kept()
    if statistics and (statistics.scale != asked.scale or len(statistics.mean) != asked.in_chans):
        statistics = None  # of a run on other images
    if statistics is None and not asked.photographs:
        statistics = _measured(ranks, path or None, asked)
    pipeline = build_pipeline(path or None, replace(asked, statistics=statistics))
    try:
        check_images(ranks, pipeline, path)
    except BaseException:
        pipeline.close()
        raise
    return pipeline


def _measured(ranks: Ranks, path: str | None, options: LoaderOptions) -> Statistics | None:
    """What the first rank measures, on every rank; what it raises, too."""
    found: Statistics | SparkFastError | None = None
    if ranks.main:
        try:
            found = measure_statistics(path, options)
        except SparkFastError as error:
            found = error
    found = ranks.gather(found)[0]
    if isinstance(found, SparkFastError):
        raise found
    return found


def open_folder(settings: Tree, lock: RunLock, pictures: str = "") -> Path:
    """The folder of these settings, locked, with their head of log.txt; see `open_run_folder`."""
    head = describe(settings.run.exp_name, settings.to_dict())
    return open_run_folder(settings.folder, lock, settings.to_toml(), head, pictures)


def open_checkpoints(
    settings: Tree,
    lock: RunLock,
    *,
    size: int,
    step: int,
    keep_last: int,
    keep_steps: int = 0,
    pictures: str = "",
) -> CheckpointManager:
    """The run folder and its checkpoints: the last to open, so that a mistake in the settings leaves nothing behind.

    Args:
        size: about the bytes of a checkpoint; step: where this process begins.
        keep_last, keep_steps, pictures: see `CheckpointManager` and `open_run_folder`.
    """
    check_space(settings.folder, size, keep_last)
    if not settings.run.resume:
        refuse_another_run(settings.folder)
    folder = open_folder(settings, lock, pictures)
    manager = CheckpointManager(folder, keep_last=keep_last, keep_steps=keep_steps)
    manager.clean(step)
    return manager


def _complain(name: str, error: Exception | str, code: int) -> int:
    print(f"{name}: {error}", file=sys.stderr, flush=True)
    return code
