"""Threads of this process fill the batches: simplejpeg's decoder and torch's resize release the GIL.

Each batch is split into chunks for a thread pool. Nothing is pickled and no process is started, but Python's lock is
taken for a fifth of an image's time: more than some four threads make it no faster, see `decoder_processes`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch
from numpy.typing import NDArray

from spark_fast.pipelines.backends.image_loader import ImageLoader
from spark_fast.pipelines.backends.workers.batch_memory import BatchMemory, Place
from spark_fast.pipelines.backends.workers.filling import Filled
from spark_fast.pipelines.sampler import Share, uniform
from spark_fast.pipelines.sources.bad_images import Loaded
from spark_fast.pipelines.sources.source import naming_image
from spark_fast.pipelines.transforms.crops import ALL_DRAWS


class Filling:
    """A batch in preparation."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self.unwanted = threading.Event()
        self.started: Future[None]  # when it is done, the rest is there
        self.place: Place | None = None
        self.chunks: list[Future[list[Loaded]]] = []


class DecoderThreads:
    """Fills batches in `workers` threads; see `Filler`.

    Args:
        parts: how a batch of so many images is split.
        stop_unless_wanted: called before each image; raises when nobody wants it, or one of the events is set.
    """

    def __init__(
        self,
        images: ImageLoader,
        memory: BatchMemory,
        seed: int,
        workers: int,
        parts: Callable[[int], list[slice]],
        stop_unless_wanted: Callable[[threading.Event], None],
    ) -> None:
        self._images, self._memory, self._seed = images, memory, seed
        self._parts, self._stop_unless_wanted = parts, stop_unless_wanted
        self.pool = _started(workers)
        self._starting = threading.Lock()  # batches are started one after the other

    def start(self, share: Share) -> Filling:
        """In a thread of the pool: the consumer's own time is a training step's."""
        filling = Filling(share)
        filling.started = self.pool.submit(self._start, filling)
        return filling

    def finish(self, filling: Filling) -> Filled:
        """See `Filler`. The threads may still hold the batch, which must not keep its memory from coming back."""
        filling.started.result()
        loaded = [sample for chunk in filling.chunks for sample in chunk.result()]
        place, filling.place = filling.place, None
        assert place is not None
        return Filled(filling.share.ids, place, loaded)

    def abandon(self, fillings: Iterable[Filling]) -> None:
        """See `Filler`."""
        fillings = list(fillings)
        for filling in fillings:
            filling.unwanted.set()
        started = [filling for filling in fillings if not filling.started.cancel()]
        wait([filling.started for filling in started])
        wait([chunk for filling in started for chunk in filling.chunks if not chunk.cancel()])
        for filling in started:  # each has stopped after the image that it was at
            if filling.place is not None:
                self._memory.give_back(filling.place)
                filling.place = None

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, filling: Filling) -> None:
        """In a decoder thread: have the threads fill the places of these samples."""
        ids = filling.share.ids
        draws = uniform(self._seed, filling.share.draw_ids, ids, ALL_DRAWS)
        with self._starting:
            filling.place = self._memory.take(len(ids))
            for part in self._parts(len(ids)):
                filling.chunks.append(self.pool.submit(self._load, filling, part, draws[part]))

    def _load(self, filling: Filling, part: slice, draws: NDArray[np.float64]) -> list[Loaded]:
        """In a decoder thread: fill a part of the batch, given its samples' numbers, (n, ALL_DRAWS)."""
        assert filling.place is not None
        out, crops, loaded = filling.place.pixels[part], filling.place.crops[part], []
        for row, (sample, numbers) in enumerate(zip(filling.share.ids[part].tolist(), draws.tolist(), strict=True)):
            self._stop_unless_wanted(filling.unwanted)
            with naming_image(self._images.source, sample):
                loaded.append(self._images.load(sample, numbers, out[row], crops[row]))
        return loaded


def _started(workers: int) -> ThreadPoolExecutor:
    """A pool whose threads run torch operators on one core each, all of them started.

    `torch.set_num_threads` sets the OpenMP team of the calling thread, and the default of threads that
    start later. So each worker sets its own to 1, and when all have, the caller sets the default back.
    """
    before = torch.get_num_threads()
    started = threading.Barrier(workers + 1)

    def prepare() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread's first look takes over the default, so let it be now
        started.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode", initializer=prepare)
    try:
        for _ in range(workers):
            pool.submit(int)  # starts a thread, as none is idle before the barrier opens
    except BaseException:
        started.abort()  # a thread too many for this machine: let the others end
        raise
    started.wait()
    torch.set_num_threads(before)
    return pool
