"""Worker processes from the trainer's side: starting, watching and ending them."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import send_handle

from spark_fast.errors import DataError, StorageError
from spark_fast.pipelines.backends.workers.orders import Forget, Lend, Setup
from spark_fast.pipelines.backends.workers.shared_memory import Block, new_file
from spark_fast.pipelines.backends.workers.worker_process import CURRENT, DONE, NOTHING, progress_of

END_SECONDS = 10.0  # for a process to say or do what takes it milliseconds; then it is killed
# OpenBLAS and OpenMP would start threads when they are imported, and a process with threads is not to be forked;
# nothing here touches a GPU
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# a program and not `multiprocessing`'s own start, which would run the user's script once more in each process
PROGRAM = """
import sys
from multiprocessing.connection import Connection
sys.path[:] = {path!r}
from spark_fast.pipelines.backends.workers.worker_process import serve
serve(Connection({control}), {setup})
"""


class Worker:
    """A worker process."""

    def __init__(self, number: int, threads: int) -> None:
        """With pipe and progress; `theirs` and `file` are for the process, and closed once it has them."""
        self.number, self.threads = number, threads
        self.pipe, self.theirs = Pipe()
        self.file = new_file(16 * threads)
        self._progress = progress_of(self.file, threads)
        self._progress[:] = 0, NOTHING
        self.pid: int | None = None  # known from its first message
        self.images = 0  # of its orders that are not answered
        self.silent = 0.0  # seconds without a message or an image, while this process ran
        self._done = 0
        self._lent: set[int] = set()

    def send(self, message: object) -> None:
        """If it has just died, the next look at the pipe will tell."""
        with suppress(OSError):
            self.pipe.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))  # half of what `send` takes

    def lend(self, block: Block) -> None:
        """Let it map a block, unless it has."""
        if block.number not in self._lent:
            self._lent.add(block.number)
            self.send(Lend(block.number, block.size))
            with suppress(OSError):
                send_handle(self.pipe, block.file, self.pid)

    def forget(self, block: int) -> None:
        """Have it unmap a block that is no longer used."""
        if block in self._lent:
            self._lent.discard(block)
            self.send(Forget(block))

    def moves(self) -> bool:
        """Whether it has done an image since it was last asked."""
        before, self._done = self._done, int(self._progress[:, DONE].sum())
        return self._done != before

    def current(self) -> list[int]:
        """The samples that its threads are at."""
        return [sample for sample in self._progress[:, CURRENT].tolist() if sample != NOTHING]


class ProcessGroup:
    """The first process and the workers that it forks, see `worker_process`."""

    def __init__(self, setup: Setup) -> None:
        self._control, theirs = Pipe()
        file = new_file(0)
        with os.fdopen(os.dup(file), "wb") as opened:
            pickle.dump(setup, opened, pickle.HIGHEST_PROTOCOL)
        os.lseek(file, 0, os.SEEK_SET)
        program = PROGRAM.format(path=sys.path, control=theirs.fileno(), setup=file)
        try:
            with _signals_blocked():
                self._first = subprocess.Popen(
                    [sys.executable, "-c", program],
                    pass_fds=(theirs.fileno(), file),
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **ENVIRONMENT},
                )
        except OSError as error:
            raise StorageError(f"no process for decoding can be started ({error}): use --worker_processes 0") from error
        finally:
            theirs.close()
            os.close(file)
        self._started = 0
        self.ready = threading.Event()  # set at the first message of a worker
        self._alive = weakref.finalize(self, _end, self._first, self._control, self.ready)  # at Python's end, too

    def fork(self, threads: int) -> Worker:
        """A new worker; it takes orders at once, and works on them when it is there."""
        worker = Worker(self._started, threads)
        self._started += 1
        with suppress(OSError):  # the first process is gone, so the worker's pipe is closed, too
            self._control.send((worker.number, threads))
            send_handle(self._control, worker.theirs.fileno(), self._first.pid)
            send_handle(self._control, worker.file, self._first.pid)
        worker.theirs.close()
        os.close(worker.file)
        return worker

    def end(self, worker: Worker) -> str | None:
        """End a worker; how it had ended, or None if the first process is gone, and with it all workers.

        Raises what kept the first process from opening the images.
        """
        worker.pipe.close()
        told: int | Exception | None = None
        with suppress(OSError):
            self._control.send((worker.number, 0))
        with suppress(EOFError, OSError):
            told = self._control.recv() if self._control.poll(END_SECONDS) else None
        if isinstance(told, int):
            return exit_code(told)
        self.close()
        if isinstance(told, DataError):
            raise told
        if told is not None:
            raise StorageError(f"a worker process cannot open the images: {told}") from told
        return None

    def how_it_ended(self) -> str:
        """After `close`: of the first process."""
        return exit_code(self._first.returncode)

    def close(self) -> None:
        """End all processes."""
        self._alive()


def _end(first: subprocess.Popen[bytes], control: Connection, ready: threading.Event) -> None:
    control.close()  # it ends its workers and itself
    if not ready.is_set():
        first.kill()  # it may be importing for seconds; what it has just forked ends with it
    try:
        first.wait(END_SECONDS)
    except subprocess.TimeoutExpired:  # it was stopped
        first.kill()
        first.wait()


def exit_code(code: int) -> str:
    """In words."""
    if code >= 0:
        return f"exit code {code}"
    more = "; usually that means that memory ran out" if code == -signal.SIGKILL else ""
    return f"{signal.Signals(-code).name}{more}"


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started meanwhile never get these signals, which reach a whole group: the trainer decides."""
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
