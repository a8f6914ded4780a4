"""Run jobs in several processes that cannot outlive their parent.

Each process has one pipe: jobs go down, progress and results come up. When the parent is gone (killed,
too) the pipe is closed, and the child ends at its next message. Nothing is named, so nothing goes stale.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from pipelines.contract import StorageError

Job = TypeVar("Job")
REPORT_SECONDS = 0.1

Advance = Callable[[int, int], None]  # images done since the last call, bytes read for them


def run_jobs(work: Callable[[Job, Advance], None], jobs: Iterable[Job], workers: int, advance: Advance) -> None:
    """Call `work(job, advance)` for every job, in `workers` processes, or in this one if that is 1.

    The first exception that a job raises is raised here, when all processes have ended.
    """
    if workers == 1:
        for job in jobs:
            work(job, advance)
        return
    context = multiprocessing.get_context("spawn")  # a forked copy of torch's threads would hang
    remaining = iter(jobs)
    children: dict[Connection, Any] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            child = context.Process(target=_serve, args=(work, theirs), daemon=True)
            with _ctrl_c_ignored():
                child.start()
            theirs.close()  # so that the child's end of the pipe is the only one
            children[ours] = child
            ours.send(next(remaining, None))
        while children:
            for pipe in wait(list(children)):
                assert isinstance(pipe, Connection)
                _hear(pipe, children, remaining, advance)
    finally:
        for pipe, child in children.items():
            child.terminate()
            child.join()
            pipe.close()


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Children started meanwhile ignore Ctrl-C for good: it reaches the whole group, the parent decides."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's business
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _hear(pipe: Connection, children: dict[Connection, Any], remaining: Any, advance: Advance) -> None:
    try:
        message = pipe.recv()
    except (EOFError, ConnectionResetError):
        child = children.pop(pipe)
        child.join()
        if child.exitcode:
            raise StorageError(
                f"a worker process died (exit code {child.exitcode}; -9 usually means that memory ran out)."
                " Whole shards are kept: run the same command again, with fewer --workers."
            ) from None
        return
    if isinstance(message, Exception):
        raise message
    if message is None:  # ready for the next job
        with suppress(BrokenPipeError):  # the child just died: the next look at the pipe will tell
            pipe.send(next(remaining, None))
    else:
        advance(*message)


class _Reports:
    """Sends progress now and then, and what is left at the end."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._images, self._bytes, self._sent = pipe, 0, 0, time.monotonic()

    def __call__(self, images: int, size: int) -> None:
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


def _serve(work: Callable[[Any, Advance], None], pipe: Connection) -> None:
    """In the child: jobs until there is none left, or no parent."""
    torch.set_num_threads(1)
    try:
        while (job := pipe.recv()) is not None:
            try:
                with _Reports(pipe) as advance:
                    work(job, advance)
            except (EOFError, BrokenPipeError):
                return
            except Exception as error:
                pipe.send(error)
                return
            pipe.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
