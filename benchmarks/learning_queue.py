"""Runs side by side, each kept as a line of a file as soon as it is finished, so that the same command goes on."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from learning_plan import Job, Rows

from spark_fast.files import atomic_write
from spark_fast.run.malloc import keep_heap

Do = Callable[[Job], dict[str, Any]]


class Record:
    """The finished runs, kept line by line; the same settings go on from them.

    Raises:
        SystemExit: they were made with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = read_rows(path)
        if self.rows.setdefault("settings", {"key": "settings", "made_with": settings})["made_with"] != settings:
            raise SystemExit(f"{path} was made with other settings: take another --out")
        with atomic_write(path) as file:
            file.write("".join(map(_line, self.rows.values())).encode())  # without a line half written

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep the row of a run that is finished."""
        self.rows[key] = {"key": key, **row}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(self.rows[key]))


def read_rows(path: Path) -> Rows:
    """The rows of a record by their keys, none where there is no file; a line that a kill cut short is left out."""
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n") if path.exists() else ("", "", "")
    rows = [json.loads(line) for line in whole.splitlines()]
    return {row["key"]: row for row in rows}


def run_ready(
    ready: Callable[[], Iterable[Job]], do: Do, processes: int, seconds: float = math.inf
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Each run and its row as it is finished, until none is left, or the time is up: then what is under way is saved.

    Args:
        ready: the runs that are not finished and can be begun, the most important first; asked whenever one ends.
        processes: runs at once; with more than one the cores are shared out to them.
    """
    until = time.monotonic() + seconds
    running: dict[Future[dict[str, Any]], Job] = {}
    with _executor(processes) as pool:
        try:
            while (left := until - time.monotonic()) > 0:
                begun = {job.key for job in running.values()}
                waiting = (job for job in ready() if job.key not in begun)
                while len(running) < processes and (job := next(waiting, None)) is not None:
                    running[pool.submit(_timed, do, job)] = job
                if not running:
                    return
                for future in wait(running, None if left == math.inf else left, FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            for process in multiprocessing.active_children() if running else ():
                process.terminate()  # a pre-training saves itself
            pool.shutdown(cancel_futures=True)


class _Here(Executor):
    """Runs in this process, when they are handed in."""

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """See `Executor`."""
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _executor(processes: int) -> Executor:
    if processes == 1:
        return _Here()
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin, (threads,))


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    keep_heap()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process whose parent was killed would go on, and hold the folder of its run against the next command."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _timed(do: Do, job: Job) -> dict[str, Any]:
    begun = time.monotonic()
    return {**do(job), "seconds": time.monotonic() - begun}


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
