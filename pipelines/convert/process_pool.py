"""Run jobs in several processes that cannot outlive their parent.

Each process has one pipe: jobs go down, progress and results come up. When the parent is gone (killed,
too) the pipe is closed, and the child ends at its next message. Nothing is named, so nothing goes stale.
A process that dies, is stopped or sends nothing is named together with the image it was at: each counts its images
in memory shared with the parent.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Generic, TypeVar

import torch

from spark_fast.errors import DataError, StorageError
from spark_fast.operating_system import process_state

Job = TypeVar("Job")
REPORT_SECONDS = 0.1
POLL_SECONDS = 1.0
SILENT_SECONDS = 10.0  # without a word from a process: then it is looked at, and given up if somebody stopped it
IDLE_SECONDS = 60.0  # the same while it starts or ends, which takes long on a busy machine
STALL_SECONDS = 600.0  # then it is given up in any case: a sound one may only be silent while a shard goes to the disk

logger = logging.getLogger("spark_fast.pipelines")

Advance = Callable[[int, int], None]  # images done since the last call, bytes read for them
Describe = Callable[[Job, int], str]  # where a job is when so many of its images are done


@dataclass
class _Worker(Generic[Job]):
    """A process, as the parent sees it."""

    process: SpawnProcess
    done: ctypes.c_int64  # shared: images done of its job
    job: Job | None = None
    started: bool = False  # it has said a word
    silent: float = 0.0  # seconds, of those in which the parent ran


def run_jobs(
    work: Callable[[Job, Advance], None],
    jobs: Iterable[Job],
    workers: int,
    advance: Advance,
    describe: Describe[Job],
) -> None:
    """Call `work(job, advance)` for every job, in `workers` processes, or in this one if that is 1.

    `describe(job, done)` says where a job is when `done` images of it are. The first exception that a job raises is
    raised here, when all processes have ended; StorageError when a process died, was stopped or stalled.
    """
    if workers == 1:
        for job in jobs:
            work(job, advance)
        return
    remaining = iter(jobs)
    children: dict[Connection, _Worker[Job]] = {}
    try:
        for _ in range(workers):
            pipe, worker = _start(work)
            children[pipe] = worker
            _give(pipe, worker, next(remaining, None))
        while children:
            before = time.monotonic()
            heard = wait(list(children), POLL_SECONDS)
            passed = min(time.monotonic() - before, POLL_SECONDS)  # not the time that the parent itself was stopped
            for pipe, worker in list(children.items()):
                if pipe in heard:
                    worker.started, worker.silent = True, 0
                    _hear(pipe, children, remaining, advance, describe)
                else:
                    _look_after(worker, passed, describe)
    finally:
        for pipe, worker in children.items():
            worker.process.kill()  # SIGTERM would wait until a stopped one goes on
            worker.process.join()
            pipe.close()


def _start(work: Callable[[Job, Advance], None]) -> tuple[Connection, _Worker[Job]]:
    context = multiprocessing.get_context("spawn")  # a forked copy of torch's threads would hang
    ours, theirs = context.Pipe()
    done = context.RawValue(ctypes.c_int64, 0)
    child = context.Process(target=_serve, args=(work, theirs, done), daemon=True)
    with _ctrl_c_ignored():
        child.start()
    theirs.close()  # so that the child's end of the pipe is the only one
    return ours, _Worker(child, done)


def _give(pipe: Connection, worker: _Worker[Job], job: Job | None) -> None:
    worker.job, worker.done.value = job, 0
    with suppress(BrokenPipeError):  # the child just died: the next look at the pipe will tell
        pipe.send(job)


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Child processes that are started meanwhile ignore Ctrl-C: it reaches them too, but their parent decides."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's business
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _hear(
    pipe: Connection,
    children: dict[Connection, _Worker[Job]],
    remaining: Iterator[Job],
    advance: Advance,
    describe: Describe[Job],
) -> None:
    worker = children[pipe]
    try:
        message = pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        if code := worker.process.exitcode:
            how = f"exit code {code}" if code > 0 else f"{signal.Signals(-code).name}, exit code {code}"
            raise StorageError(
                f"a worker process died ({how}; SIGKILL usually means out of memory) at {_place(worker, describe)}."
                " Finished shards are kept: run the same command again, with fewer --workers."
            ) from None
        del children[pipe]
        pipe.close()
        return
    if isinstance(message, Exception):
        raise message
    if isinstance(message, str):
        raise RuntimeError(f"in a worker process, at {_place(worker, describe)}:\n{message}")
    if message is None:  # ready for the next job
        _give(pipe, worker, next(remaining, None))
    else:
        advance(*message)


def _look_after(worker: _Worker[Job], passed: float, describe: Describe[Job]) -> None:
    """Count `passed` seconds of silence; report a process that is silent for long, and give up a lost one."""
    before, worker.silent = worker.silent, worker.silent + passed
    if worker.silent < SILENT_SECONDS:
        return
    state = process_state(worker.process.pid)
    report = (
        f"worker process {worker.process.pid} has been silent for {worker.silent:.0f} s"
        f" ({_STATES.get(state, f'state {state}')}) at {_place(worker, describe)}"
    )
    if state in "Tt" or worker.silent >= STALL_SECONDS:
        raise StorageError(f"{report}: given up. Finished shards are kept: run the same command again.")
    at_work = worker.started and worker.job is not None
    if before < (SILENT_SECONDS if at_work else IDLE_SECONDS) <= worker.silent:
        logger.warning("%s: given up after %.0f s", report, STALL_SECONDS)


_STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a disk", "R": "running", "S": "sleeping"}


def _place(worker: _Worker[Job], describe: Describe[Job]) -> str:
    return "no job" if worker.job is None else describe(worker.job, worker.done.value)


class _Reports:
    """Sends progress every REPORT_SECONDS, and the rest at the end."""

    def __init__(self, pipe: Connection, done: ctypes.c_int64) -> None:
        self._pipe, self._done, self._images, self._bytes, self._sent = pipe, done, 0, 0, time.monotonic()

    def __call__(self, images: int, size: int) -> None:
        self._done.value += images
        self._images, self._bytes = self._images + images, self._bytes + size
        if time.monotonic() - self._sent > REPORT_SECONDS:
            self._send()

    def _send(self) -> None:
        self._pipe.send((self._images, self._bytes))
        self._images, self._bytes, self._sent = 0, 0, time.monotonic()

    def __enter__(self) -> Advance:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self._send()


def _serve(work: Callable[[Job, Advance], None], pipe: Connection, done: ctypes.c_int64) -> None:
    """In the child: work on jobs until there is none left, or no parent."""
    faulthandler.enable()  # a crash in a decoder shows where, on stderr
    torch.set_num_threads(1)
    try:
        pipe.send((0, 0))  # the first word
        while (job := pipe.recv()) is not None:
            try:
                with _Reports(pipe, done) as advance:
                    work(job, advance)
            except (EOFError, BrokenPipeError):
                return
            except (DataError, OSError) as error:  # expected: the message says all
                pipe.send(error)
                return
            except Exception:
                pipe.send(traceback.format_exc())  # as text: not every exception survives the journey
                return
            pipe.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
