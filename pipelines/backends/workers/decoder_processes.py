"""Threads of several worker processes fill the batches, each process under a Python lock of its own.

A batch is split into orders, a few for each worker: the one with the least to do gets the next. Orders and answers are
short messages; the pixels go into memory that all share. There is no thread for this in the trainer's process: it
gives orders when it begins with a batch, and hears the answers when it waits for one.

A worker that dies, or that somebody stops, is replaced, and its orders are given again. The images that it was at are
named; one at which three workers end in a row ends the run.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import CancelledError
from typing import NoReturn

from spark_fast.errors import DataError, StorageError
from spark_fast.operating_system import process_state
from spark_fast.pipelines.backends.workers.batch_memory import BatchMemory, Place
from spark_fast.pipelines.backends.workers.filling import Filled
from spark_fast.pipelines.backends.workers.orders import PLAIN, Answer, Cancel, Order, Ready, Setup
from spark_fast.pipelines.backends.workers.process_group import ProcessGroup, Worker
from spark_fast.pipelines.backends.workers.shared_memory import SharedBlocks
from spark_fast.pipelines.sampler import Share

ATTEMPTS = 3  # that an image, or a start, gets
POLL_SECONDS = 1.0
SILENT_SECONDS = 10.0  # without an image from a worker: then it is looked at, and replaced if somebody stopped it
STALL_SECONDS = 600.0  # then it is given up in any case
MANY_BLOCKS = 32  # of shared memory: if the consumer keeps more batches, it gets copies, as each block is an open file

logger = logging.getLogger("spark_fast.pipelines")


class Filling:
    """A batch in preparation."""

    def __init__(self, number: int, share: Share, place: Place) -> None:
        self.number, self.share = number, share
        self.place: Place | None = place
        self.open: dict[int, tuple[Order, Worker]] = {}  # by first row: what is not answered, and who works on it
        self.answers: list[Answer] = []
        self.lost = False  # its processes were given up


class DecoderProcesses:
    """Fills batches in `threads` threads of `processes` processes; see `Filler`."""

    def __init__(self, setup: Setup, memory: BatchMemory, blocks: SharedBlocks, threads: int, processes: int) -> None:
        self._setup, self._memory, self._blocks = setup, memory, blocks
        self._threads = [len(range(i, threads, processes)) for i in range(processes)]  # of each worker
        self._group: ProcessGroup | None = None  # started with the first batch
        self.workers: list[Worker] = []
        self._fillings: dict[int, Filling] = {}
        self._begun = 0
        self._lock = threading.Lock()  # two epochs may be read at once
        self._closed = False
        self._ended_at: Counter[int] = Counter()  # workers that ended at a sample
        self._failed_starts = 0

    def start(self, share: Share) -> Filling:
        """See `Filler`."""
        with self._lock:
            self._stop_if_closed()
            if self._group is None:
                self._start_group()
            self._pass_on_dropped_blocks()
            place = self._memory.take(len(share.ids))
            filling = self._fillings[self._begun] = Filling(self._begun, share, place)
            self._begun += 1
            block = self._blocks.of(place.pixels).number
            size = _order_size(len(share.ids), len(self.workers))
            for first in range(0, len(share.ids), size):
                rows = slice(first, first + size)
                self._give(filling, Order(filling.number, first, block, share.ids[rows], share.draw_ids[rows]))
            return filling

    def finish(self, filling: Filling) -> Filled:
        """See `Filler`."""
        self._wait_for(filling)
        answers = sorted(filling.answers, key=lambda answer: answer.first)
        for answer in answers:
            if answer.failed:
                raise answer.failed.error from RuntimeError(f"in a worker process:\n{answer.failed.trace}")
        loaded = [PLAIN] * len(filling.share.ids)
        for answer in answers:
            for row, sample in answer.loaded.items():
                loaded[answer.first + row] = sample
        place, filling.place = filling.place, None
        assert place is not None
        del self._fillings[filling.number]
        if place.slot is None and len(self._blocks) > MANY_BLOCKS:
            place = Place(place.pixels.clone(), place.crops.clone())
        return Filled(filling.share.ids, place, loaded)

    def abandon(self, fillings: Iterable[Filling]) -> None:
        """See `Filler`."""
        fillings = list(fillings)
        with self._lock:
            for filling in fillings:
                for worker in {worker for _, worker in filling.open.values()}:
                    worker.send(Cancel(filling.number))
        for filling in fillings:
            try:
                self._wait_for(filling)
            except (CancelledError, StorageError):  # no process is left
                filling.open.clear()
            self._fillings.pop(filling.number, None)
            if filling.place is not None:
                self._memory.give_back(filling.place)
                filling.place = None

    def close(self) -> None:
        """End the processes."""
        self._closed = True
        with self._lock:
            if self._group is not None:
                self._group.close()
            for worker in self.workers:
                worker.pipe.close()
            self.workers.clear()

    def _stop_if_closed(self) -> None:
        """Also when the interpreter ends, which has then ended the processes."""
        if self._closed or not threading.main_thread().is_alive():
            raise CancelledError

    def _start_group(self) -> None:
        self._group = ProcessGroup(self._setup)
        self.workers[:] = [self._group.fork(threads) for threads in self._threads]

    def _pass_on_dropped_blocks(self) -> None:
        while self._blocks.dropped:
            number = self._blocks.dropped.popleft()
            for worker in self.workers:
                worker.forget(number)

    def _give(self, filling: Filling, order: Order) -> None:
        """To the worker with the least to do for each of its threads."""
        worker = min(self.workers, key=lambda worker: worker.images / worker.threads)
        assert filling.place is not None
        worker.lend(self._blocks.of(filling.place.pixels))
        worker.send(order)
        worker.images += len(order.ids)
        filling.open[order.first] = order, worker

    def _wait_for(self, filling: Filling) -> None:
        """Until all orders of a batch are answered."""
        while filling.open:
            with self._lock:
                self._stop_if_closed()
                if filling.open:
                    self._listen()
        if filling.lost:
            raise StorageError("the worker processes were given up")

    def _listen(self) -> None:
        """Hear what the workers say, for POLL_SECONDS at most; replace those that are lost."""
        pipes, poll = {worker.pipe.fileno(): worker for worker in self.workers}, select.poll()
        for file in pipes:
            poll.register(file, select.POLLIN)
        before = time.monotonic()
        heard = {file for file, _ in poll.poll(1e3 * POLL_SECONDS)}
        passed = min(time.monotonic() - before, POLL_SECONDS)  # not the time that this process itself was stopped
        for file, worker in pipes.items():
            if worker not in self.workers:
                continue  # gone with the others
            if file in heard:
                self._hear(worker)
            elif worker.images:
                self._look_after(worker, passed)

    def _hear(self, worker: Worker) -> None:
        worker.silent = 0
        worker.moves()  # from here on
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            self._replace(worker, "ended")
            return
        if isinstance(message, Ready):
            worker.pid, self._failed_starts = message.pid, 0
            assert self._group is not None
            self._group.ready.set()
        elif isinstance(message, Answer):
            filling = self._fillings[message.batch]
            order, _ = filling.open.pop(message.first)
            worker.images -= len(order.ids)
            filling.answers.append(message)

    def _look_after(self, worker: Worker, passed: float) -> None:
        """Count `passed` seconds of silence; replace a worker that somebody stopped, and report one that stalls."""
        before, worker.silent = worker.silent, worker.silent + passed
        if worker.silent < SILENT_SECONDS:
            return
        if worker.moves():
            worker.silent = 0
            return
        if (state := process_state(worker.pid)) in "Tt":
            self._replace(worker, f"was stopped, and has done nothing for {worker.silent:.0f} s")
            return
        report = f"worker process {worker.pid} has done nothing for {worker.silent:.0f} s (state {state})"
        if worker.silent >= STALL_SECONDS:
            self._give_up(f"{report} {self._place(worker)}")
        if before < SILENT_SECONDS and worker.pid is not None:
            logger.warning("%s %s", report, self._place(worker))

    def _place(self, worker: Worker) -> str:
        """The images that a worker is at, in words."""
        source, samples = self._setup.images.source, worker.current()
        return "at " + ", ".join(f"image {i} ({source.name(i)})" for i in samples) if samples else "at no image"

    def _replace(self, worker: Worker, what: str) -> None:
        """Give the orders of a lost worker, or of all if they are, to new ones.

        Raises StorageError if too many have been lost at the same image, or at their start.
        """
        assert self._group is not None
        samples, place = worker.current(), self._place(worker)
        try:
            how = self._group.end(worker)
        except (DataError, StorageError):  # the images cannot be opened
            self._end_group()
            raise
        lost = [worker] if how else list(self.workers)
        how = how or f"with all others, as the process that starts them had: {self._group.how_it_ended()}"
        report = f"worker process {worker.pid or 'that was starting'} {what} ({how}) {place}"
        self._failed_starts += worker.pid is None
        self._ended_at.update(samples)
        if self._failed_starts >= ATTEMPTS or any(self._ended_at[i] >= ATTEMPTS for i in samples):
            self._give_up(f"{report}. So did {ATTEMPTS - 1} before it")
        logger.warning("%s. Its images are decoded again", report)
        if len(lost) == 1:
            self.workers[self.workers.index(worker)] = self._group.fork(worker.threads)
        else:
            for other in lost:
                other.pipe.close()
            self._start_group()
        for filling in self._fillings.values():
            for order, who in list(filling.open.values()):
                if who in lost:
                    self._give(filling, order)

    def _give_up(self, report: str) -> NoReturn:
        self._end_group()
        raise StorageError(f"{report}: given up. --worker_processes 0 decodes in this process")

    def _end_group(self) -> None:
        """End what is left, so that nobody writes to the batches any more."""
        assert self._group is not None
        self._group.close()
        self._group = None
        for filling in self._fillings.values():
            filling.lost = bool(filling.open)
            filling.open.clear()


def _order_size(images: int, workers: int) -> int:
    """Images of an order: two orders a worker in each batch, but no fewer images than pay for the messages."""
    each = -(-images // workers)
    return min(max(-(-each // 2), 4), each)
