"""The default pipeline: CPU threads decode, crop and resize; the device normalises.

`worker_processes` decides whether the threads belong to this process (`decoder_threads`) or to several others
(`decoder_processes`). Either way every image has its place in a batch's memory, so the result does not depend on who
finishes first. At most `prefetch` batches are in preparation while the consumer works on one.

For CUDA that memory holds bytes, a quarter of what fp32 would put over the bus, and is pinned. Without it the
threads normalise too, image by image while it is in their cache. With `augment_on="device"` the threads only decode
and copy the crops, and the device does all the rest (`device_augment`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spark_fast.operating_system import usable_cores
from spark_fast.pipelines.backends.backend import Backend
from spark_fast.pipelines.backends.band_loader import BandLoader
from spark_fast.pipelines.backends.image_loader import ImageLoader
from spark_fast.pipelines.backends.workers.batch_memory import (
    BatchMemory,
    HostMemory,
    Layout,
    PinnedMemory,
    Place,
    pinned,
)
from spark_fast.pipelines.backends.workers.decoder_processes import DecoderProcesses
from spark_fast.pipelines.backends.workers.decoder_threads import DecoderThreads
from spark_fast.pipelines.backends.workers.filling import Filled, Filler, choose_processes
from spark_fast.pipelines.backends.workers.orders import Setup
from spark_fast.pipelines.backends.workers.shared_memory import SharedBlocks, pinned_by
from spark_fast.pipelines.base import Batch
from spark_fast.pipelines.options import LoaderOptions
from spark_fast.pipelines.sampler import Sampler, Share
from spark_fast.pipelines.sources.source import Source
from spark_fast.pipelines.transforms.bands.band_augment import BandAugment
from spark_fast.pipelines.transforms.bands.decode_bands import BY_PYTHON
from spark_fast.pipelines.transforms.bands.scaling import BandNormalise
from spark_fast.pipelines.transforms.device_augment import DeviceAugment
from spark_fast.pipelines.transforms.resize import Normalise

logger = logging.getLogger("spark_fast.pipelines")


class TorchPipeline(Backend):
    """Batches of `source`, as the options say."""

    def __init__(self, source: Source, sampler: Sampler, options: LoaderOptions) -> None:
        super().__init__(source, sampler, options)
        self._on_device: DeviceAugment | None = None
        stored = torch.uint8  # numbers of the pixels that the device normalises
        if options.statistics:
            stored = getattr(torch, options.statistics.dtype)
        dtype = stored if self._on_cuda else self._dtype
        if options.augment_on == "device":
            self._on_device = self._device_augment(self.device)
            self._shape, dtype = (self._share, *self._on_device.cell, options.in_chans), stored
        self._stream = torch.cuda.Stream(self.device) if self._on_cuda else None
        self._filler = self._make_filler(Layout(self._shape, dtype), options)

    def _make_filler(self, layout: Layout, options: LoaderOptions) -> Filler[Any]:
        """What fills the batches, and their memory."""
        in_python = bool(options.statistics) and self._source.name(0).lower().endswith(BY_PYTHON)
        processes, why = choose_processes(options.worker_processes, self._workers, usable_cores(), in_python)
        logger.info("%d threads decode, in %s: %s", self._workers,
                    f"{processes} worker processes" if processes else "this process", why)  # fmt: skip
        kept, seed = self._prefetch + 2, self._sampler.seed
        self._memory: BatchMemory
        if not processes:
            self._memory = PinnedMemory(layout, pinned) if self._on_cuda else HostMemory(layout, kept)
            images = self._loader(options, self._on_device)
            return DecoderThreads(images, self._memory, seed, self._workers, self._parts, self._stop_unless_wanted)
        blocks = SharedBlocks()
        self._memory = (
            PinnedMemory(layout, pinned_by(blocks)) if self._on_cuda else HostMemory(layout, kept, blocks.allocate)
        )
        on_host = self._device_augment(torch.device("cpu")) if self._on_device else None
        setup = Setup(self._loader(options, on_host), layout, seed)
        return DecoderProcesses(setup, self._memory, blocks, self._workers, processes)

    def _device_augment(self, device: torch.device) -> DeviceAugment:
        """What a device does with cells; the host's part of it, for another process, is that of the CPU."""
        normalise = self._normalise
        if not isinstance(normalise, BandNormalise):
            return DeviceAugment(self._size, device, self._dtype)
        if device != self.device and self.statistics:
            normalise = BandNormalise(self.statistics, self._size[1], device, self._dtype)
        return BandAugment(self._size, device, self._dtype, normalise)

    def _loader(self, options: LoaderOptions, device_augment: DeviceAugment | None) -> ImageLoader:
        """What the threads do with an image; on the host they normalise it, too."""
        on_host = self._on_device is None and not self._on_cuda
        if options.statistics:
            assert isinstance(self._normalise, BandNormalise)
            return BandLoader(
                self._source, self._augmentation, device_augment=device_augment, max_pixels=self._max_pixels,
                expected=options.expected, statistics=options.statistics,
                band_normalise=self._normalise if on_host else None,
            )  # fmt: skip
        assert isinstance(self._normalise, Normalise)
        normalise = self._normalise if on_host else None
        return ImageLoader(self._source, self._augmentation, normalise, device_augment, self._max_pixels)

    def close(self) -> None:
        """Stop the decoder threads and processes and close the source."""
        self._closed.set()
        self._filler.close()
        self._source.close()

    def _batches(self, steps: Iterator[Share]) -> Generator[Batch, None, None]:
        pending: deque[Any] = deque()

        def start_next() -> None:
            if (share := next(steps, None)) is not None:
                pending.append(self._filler.start(share))

        try:
            for _ in range(self._prefetch):
                start_next()
            while pending:
                ids, place = self._collect(pending[0])
                pending.popleft()
                images = self._upload(place)
                del place  # the consumer alone decides when the memory comes back
                labels = self._labels(ids)
                start_next()  # last: the thread that it wakes takes the GIL
                yield Batch(images, labels, torch.from_numpy(ids.copy()))
        finally:
            self._filler.abandon(pending)

    def _collect(self, filling: Any) -> tuple[NDArray[np.int64], Place]:
        """Wait for a batch and count its bad images; here, so that counts and warnings come in order."""
        try:
            filled: Filled = self._filler.finish(filling)
        except (CancelledError, RuntimeError) as error:
            if self._closed.is_set() or isinstance(error, CancelledError):
                raise RuntimeError("this pipeline was closed while it was being read") from None
            raise
        self._bad_images.count(filled.ids.tolist(), filled.loaded)
        return filled.ids, filled.place

    def _upload(self, place: Place) -> Tensor:
        """A batch's images, normalised, on the device: (B, C, H, W)."""
        if place.slot is None or self._stream is None:
            return self._on_device(place.pixels, place.crops) if self._on_device else self._from_host(place.pixels)
        with torch.cuda.stream(self._stream):
            pixels = place.pixels.to(self.device, non_blocking=True)
            crops = place.crops.to(self.device, non_blocking=True)
            place.slot.copied.record()
            images = self._on_device(pixels, crops) if self._on_device else self._normalise(pixels)
        self._memory.give_back(place)
        consumer = torch.cuda.current_stream(self.device)
        consumer.wait_stream(self._stream)
        images.record_stream(consumer)  # allocated on the side stream: not to be reused while in use here
        return images
