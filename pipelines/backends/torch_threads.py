"""The default pipeline: CPU threads decode, crop and resize; the device normalises.

Threads, not processes: simplejpeg's decoder and torch's resize release the GIL, so threads scale, and
nothing is pickled, forked or left in /dev/shm. Each batch is split into chunks for a thread pool; every
image has its place in a preallocated buffer, so the result does not depend on who finishes first.
At most `prefetch` batches are in preparation while the consumer works on one.

For CUDA the buffer holds bytes, a quarter of what fp32 would put over the bus, and is pinned. Without it the
threads normalise too, image by image while it is in their cache. With `augment_on="device"` the threads only decode
and copy the crops, and all the rest is the device's (`device_augment`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spark_fast.pipelines.backends.backend import Backend
from spark_fast.pipelines.backends.band_loader import BandLoader
from spark_fast.pipelines.backends.buffers import Buffers
from spark_fast.pipelines.backends.image_loader import ImageLoader
from spark_fast.pipelines.base import Batch
from spark_fast.pipelines.options import LoaderOptions
from spark_fast.pipelines.sampler import Sampler, Share, uniform
from spark_fast.pipelines.sources.bad_images import Loaded
from spark_fast.pipelines.sources.source import Source
from spark_fast.pipelines.transforms.bands.band_augment import BandAugment
from spark_fast.pipelines.transforms.bands.scaling import BandNormalise
from spark_fast.pipelines.transforms.crops import ALL_DRAWS
from spark_fast.pipelines.transforms.device_augment import DeviceAugment
from spark_fast.pipelines.transforms.resize import Normalise


class _Slot:
    """Pinned bytes of one batch, refilled once their copy to the CUDA device is done."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.pixels = torch.empty(shape, dtype=dtype, pin_memory=True)  # (B, H, W, C)
        self.crops = torch.empty(shape[0], 3, dtype=torch.int64, pin_memory=True)
        self.copied = torch.cuda.Event()


@dataclass
class _Pending:
    """A batch in preparation."""

    ids: NDArray[np.int64]
    pixels: Tensor  # (B, H, W, C), of `dtype` and normalised, or numbers for the device: images, or cells with crops
    crops: Tensor  # (B, 3) int64, see `DeviceAugment.put`
    slot: _Slot | None
    chunks: list[Future[list[Loaded]]] = field(default_factory=list)


class TorchPipeline(Backend):
    """Batches of `source`, as the options say."""

    def __init__(self, source: Source, sampler: Sampler, options: LoaderOptions) -> None:
        super().__init__(source, sampler, options)
        self._on_device: DeviceAugment | None = None
        self._stored = torch.uint8  # numbers of the pixels that the device normalises
        if options.statistics:
            self._stored = getattr(torch, options.statistics.dtype)
        if options.augment_on == "device":
            self._on_device = self._device_augment()
            self._shape = (self._share, *self._on_device.cell, options.in_chans)
            self._buffers = Buffers(self._shape, self._stored, kept=self._prefetch + 2)
        self._images = self._loader(options)
        self._stream = torch.cuda.Stream(self.device) if self._on_cuda else None
        self._slots: list[_Slot] = []  # idle ones
        self._pool = _decoder_threads(self._workers)
        self._starting = threading.Lock()  # batches are started one after the other

    def _device_augment(self) -> DeviceAugment:
        if isinstance(self._normalise, BandNormalise):
            return BandAugment(self._size, self.device, self._dtype, self._normalise)
        return DeviceAugment(self._size, self.device, self._dtype)

    def _loader(self, options: LoaderOptions) -> ImageLoader:
        """What the threads do with an image; on the host they normalise it, too."""
        asked: dict[str, Any] = {"device_augment": self._on_device, "max_pixels": self._max_pixels}
        on_host = self._on_device is None and not self._on_cuda
        if options.statistics:
            assert isinstance(self._normalise, BandNormalise)
            asked |= {"expected": options.expected, "statistics": options.statistics}
            normalise = self._normalise if on_host else None
            return BandLoader(self._source, self._augmentation, band_normalise=normalise, **asked)
        assert isinstance(self._normalise, Normalise)
        return ImageLoader(self._source, self._augmentation, self._normalise if on_host else None, **asked)

    def close(self) -> None:
        """Stop the decoder threads and close the source."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._source.close()

    def _batches(self, steps: Iterator[Share]) -> Generator[Batch, None, None]:
        left = threading.Event()  # set when the consumer is gone
        pending: deque[Future[_Pending]] = deque()

        def start_next() -> None:  # by a thread of the pool: the consumer's own time is a training step's
            if (share := next(steps, None)) is not None:
                pending.append(self._pool.submit(self._start_batch, share, left))

        try:
            for _ in range(self._prefetch):
                start_next()
            while pending:
                done = self._collect(pending[0])
                pending.popleft()
                images = self._upload(done)
                del done.pixels  # a thread may still hold the batch, which must not keep its memory from coming back
                labels = self._labels(done.ids)
                start_next()  # last: the thread that it wakes takes the GIL
                yield Batch(images, labels, torch.from_numpy(done.ids.copy()))
        finally:
            left.set()
            started = [batch for batch in pending if not batch.cancel()]
            wait(started)
            batches = [batch.result() for batch in started if not batch.exception()]
            chunks = [chunk for batch in batches for chunk in batch.chunks if not chunk.cancel()]
            wait(chunks)  # each stops after the image it is at; then nobody writes to the slots
            self._slots.extend(batch.slot for batch in batches if batch.slot)

    def _start_batch(self, share: Share, left: threading.Event) -> _Pending:
        """In a decoder thread: let the threads fill a slot, or the first part of it, with these samples."""
        ids = share.ids
        draws = uniform(self._sampler.seed, share.draw_ids, ids, ALL_DRAWS)
        with self._starting:
            slot = self._idle_slot() if self._stream is not None else None
            pixels = (slot.pixels if slot else self._buffers.take())[: len(ids)]
            crops = slot.crops[: len(ids)] if slot else torch.empty(len(ids), 3, dtype=torch.int64)
            batch = _Pending(ids, pixels, crops, slot)
            for part in self._parts(len(ids)):
                batch.chunks.append(self._pool.submit(self._load, batch, part, draws[part], left))
        return batch

    def _idle_slot(self) -> _Slot:
        """The longest idle slot; not the one just delivered, so that its copy has time to finish."""
        slot = self._slots.pop(0) if len(self._slots) > 1 else _Slot(self._shape, self._stored)
        slot.copied.synchronize()
        return slot

    def _load(self, batch: _Pending, part: slice, draws: NDArray[np.float64], left: threading.Event) -> list[Loaded]:
        """In a decoder thread: fill a part of the batch, given its samples' numbers, (n, ALL_DRAWS)."""
        out, crops, loaded = batch.pixels[part], batch.crops[part], []
        for place, (sample, numbers) in enumerate(zip(batch.ids[part].tolist(), draws.tolist(), strict=True)):
            self._stop_unless_wanted(left)
            with self._naming(sample):
                loaded.append(self._images.load(sample, numbers, out[place], crops[place]))
        return loaded

    def _collect(self, started: Future[_Pending]) -> _Pending:
        """Wait for a batch and count its bad images; here, so that counts and warnings come in order."""
        try:
            batch = started.result()
            loaded = [sample for chunk in batch.chunks for sample in chunk.result()]
        except (CancelledError, RuntimeError) as error:
            if self._closed.is_set() or isinstance(error, CancelledError):
                raise RuntimeError("this pipeline was closed while it was being read") from None
            raise
        self._bad_images.count(batch.ids.tolist(), loaded)
        return batch

    def _upload(self, batch: _Pending) -> Tensor:
        """A batch's images, normalised, on the device: (B, C, H, W)."""
        slot = batch.slot
        if slot is None or self._stream is None:
            return self._on_device(batch.pixels, batch.crops) if self._on_device else self._from_host(batch.pixels)
        with torch.cuda.stream(self._stream):
            pixels = batch.pixels.to(self.device, non_blocking=True)
            crops = batch.crops.to(self.device, non_blocking=True)
            slot.copied.record()
            images = self._on_device(pixels, crops) if self._on_device else self._normalise(pixels)
        self._slots.append(slot)
        consumer = torch.cuda.current_stream(self.device)
        consumer.wait_stream(self._stream)
        images.record_stream(consumer)  # allocated on the side stream: not to be reused while in use here
        return images


def _decoder_threads(workers: int) -> ThreadPoolExecutor:
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
