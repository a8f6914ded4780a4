"""What runs in the processes that decode: a first one, and the workers that are forked from it.

The first process is started as a program, imports what decoding needs, and opens the source. It runs no thread and no
torch operator; so a worker is a fork of it, which is there in milliseconds, and shares its 300 MB of libraries, the
list of files and which images have been judged. It also says how a worker ended, and ends them all when the trainer is
gone, killed too: then their pipe is closed.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import pickle
import signal
import threading
import traceback
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray

from spark_fast.errors import DataError
from spark_fast.pipelines.backends.workers.orders import (
    PLAIN,
    Answer,
    Cancel,
    Failed,
    Forget,
    Lend,
    Order,
    Ready,
    Setup,
)
from spark_fast.pipelines.backends.workers.shared_memory import mapped
from spark_fast.pipelines.sampler import uniform
from spark_fast.pipelines.sources.bad_images import Loaded
from spark_fast.pipelines.sources.source import naming_image
from spark_fast.pipelines.transforms.crops import ALL_DRAWS

DONE, CURRENT = 0, 1  # columns of a worker's progress, a row a thread: images done; the sample it is at, or NOTHING
NOTHING = -1
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def progress_of(file: int, threads: int) -> NDArray[np.int64]:
    """How far a worker is, (threads, 2), in memory shared with the trainer's process."""
    return mapped(file, 16 * threads).view(np.int64).reshape(threads, 2)


def serve(control: Connection, setup: int) -> None:
    """In the first process: fork and end workers as the trainer says, until it is gone.

    Args:
        setup: descriptor of the pickled `Setup`.
    """
    faulthandler.enable()  # a crash in a decoder shows where, on stderr
    try:
        with os.fdopen(setup, "rb") as file:
            known: Setup = pickle.load(file)  # noqa: S301  # what this pipeline's own process has written
    except (DataError, OSError) as error:  # the data have changed since the trainer opened them
        control.send(error)
        return
    torch.set_num_threads(1)
    gc.freeze()  # what is never collected is never written to, and stays shared
    workers: dict[int, int] = {}  # number -> pid
    while (message := _received(control)) is not None:
        number, threads = message
        if threads:
            files = recv_handle(control), recv_handle(control)
            workers[number] = _fork(known, threads, *files, control)
        else:
            control.send(_end(workers.pop(number)))
    for pid in workers.values():
        os.kill(pid, signal.SIGKILL)
    for pid in workers.values():
        os.waitpid(pid, 0)
    os._exit(0)  # the libraries need no tidying up


def _received(pipe: Connection) -> tuple | None:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None


def _end(pid: int) -> int:
    """End a worker, unless it has ended; how it did, as `waitstatus_to_exitcode` says it."""
    os.kill(pid, signal.SIGKILL)  # it is not waited for yet, so the number is still its own
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fork(setup: Setup, threads: int, pipe: int, progress: int, control: Connection) -> int:
    """Start a worker; its number."""
    if pid := os.fork():
        os.close(pipe)
        os.close(progress)
        return pid
    try:  # a worker from here on
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # also where it is stopped
        control.close()
        _Worker(setup, Connection(pipe), progress_of(progress, threads)).run()
    except BaseException:
        traceback.print_exc()
    os._exit(1)


class _Job:
    """An order in work."""

    def __init__(self, order: Order, worker: _Worker) -> None:
        self.order = order
        self.ids, self.left = order.ids.tolist(), len(order.ids)
        self.draws = uniform(worker.setup.seed, order.draw_ids, order.ids, ALL_DRAWS).tolist()
        rows = slice(order.first, order.first + len(order.ids))
        pixels, crops = worker.setup.layout.views(torch.from_numpy(worker.blocks[order.block]))
        self.pixels, self.crops = pixels[rows], crops[rows]
        self.loaded: dict[int, Loaded] = {}
        self.failed: tuple[int, Failed] | None = None  # with the row

    def fail(self, row: int, error: Exception) -> None:
        """The first row's failure is told, as where one thread works alone."""
        if self.failed is None or row < self.failed[0]:
            self.failed = row, Failed(_sendable(error), "".join(traceback.format_exception(error)))


def _sendable(error: Exception) -> Exception:
    """A failure in types that every process knows."""
    return DataError(str(error)) if isinstance(error, DataError) else RuntimeError(str(error))


class _Worker:
    """Answers orders, in threads of its own."""

    def __init__(self, setup: Setup, pipe: Connection, progress: NDArray[np.int64]) -> None:
        self.setup, self._pipe, self._progress = setup, pipe, progress
        self.blocks: dict[int, NDArray[np.uint8]] = {}
        self._todo: SimpleQueue[tuple[_Job, int]] = SimpleQueue()  # an order and one of its rows
        self._cancelled: set[int] = set()
        self._counting, self._sending = threading.Lock(), threading.Lock()

    def run(self) -> None:
        """Take orders until the trainer is gone; does not return."""
        self._progress[:] = 0, NOTHING
        for thread in range(len(self._progress)):
            threading.Thread(target=self._decode, args=(thread,), daemon=True).start()
        self._send(Ready(os.getpid()))
        while (message := _received(self._pipe)) is not None:
            if isinstance(message, Order):
                job = _Job(message, self)
                for row in range(job.left):
                    self._todo.put((job, row))
            elif isinstance(message, Lend):
                file = recv_handle(self._pipe)
                self.blocks[message.block] = mapped(file, message.size)
                os.close(file)  # the mapping has one of its own
            elif isinstance(message, Forget):
                self.blocks.pop(message.block, None)
            elif isinstance(message, Cancel):
                self._cancelled.add(message.batch)
        os._exit(0)

    def _decode(self, thread: int) -> None:
        torch.set_num_threads(1)
        progress = self._progress[thread]
        while True:
            job, row = self._todo.get()
            if job.failed is None and job.order.batch not in self._cancelled:
                progress[CURRENT] = job.ids[row]
                self._load(job, row)
                progress[CURRENT] = NOTHING
            progress[DONE] += 1
            with self._counting:
                job.left -= 1
                last = not job.left
            if last:
                order, failed = job.order, job.failed and job.failed[1]
                self._send(Answer(order.batch, order.first, job.loaded, failed))
            del job  # its memory may be forgotten while this thread waits

    def _load(self, job: _Job, row: int) -> None:
        images, sample = self.setup.images, job.ids[row]
        try:
            with naming_image(images.source, sample):
                loaded = images.load(sample, job.draws[row], job.pixels[row], job.crops[row])
        except Exception as error:
            job.fail(row, error)
        else:
            if loaded != PLAIN:
                job.loaded[row] = loaded

    def _send(self, message: object) -> None:
        with self._sending:
            try:
                self._pipe.send(message)
            except OSError:  # the trainer is gone
                os._exit(0)
