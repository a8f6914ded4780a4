"""What the decoding backends have in common: options, labels, errors, and an epoch that is refused once closed."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError
from contextlib import closing, suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spark_fast.pipelines.backends.buffers import Buffers
from spark_fast.pipelines.base import Batch
from spark_fast.pipelines.options import LoaderOptions
from spark_fast.pipelines.sampler import Sampler, Share
from spark_fast.pipelines.sources.bad_images import BadImages
from spark_fast.pipelines.sources.source import Source, empty_classes, num_classes
from spark_fast.pipelines.transforms.bands.scaling import BandNormalise
from spark_fast.pipelines.transforms.crops import Augmentation
from spark_fast.pipelines.transforms.decode import MEGAPIXEL
from spark_fast.pipelines.transforms.resize import Normalise


class Backend(ABC):
    """Batches of `source`, as the options say."""

    def __init__(self, source: Source, sampler: Sampler, options: LoaderOptions) -> None:
        self.num_samples, self.listing = len(source), source.fingerprint()
        self.labels: NDArray[np.int32] | None = source.labels
        self.classes = source.classes
        self.num_classes, self.empty_classes = num_classes(source), empty_classes(source)
        self._bad_images = BadImages(source, options.max_bad_fraction)
        self.bad_images = self._bad_images.counts
        self.device = _numbered(torch.device(options.device))
        self._source = source
        self._max_pixels = options.max_pixels * MEGAPIXEL
        self._dtype = options.dtype
        self._size, view = options.size, options.view
        self._augmentation = Augmentation(
            self._size,
            view.scale,
            view.ratio,
            view.flip,
            view.vflip,
            view.rot90,
            random=view.augment,
            centre=view.centre,
        )
        self._sampler = sampler
        self._workers, self._prefetch = max(options.workers, 1), max(options.prefetch, 1)
        self._share = sampler.batch_size // sampler.world_size  # samples of this rank in a step
        self._shape = (self._share, *self._size, options.in_chans)  # of a batch's pixels
        self._on_cuda = self.device.type == "cuda"  # there the device normalises, else the host
        where = self.device if self._on_cuda else torch.device("cpu")
        self.statistics = options.statistics
        self._normalise: Normalise | BandNormalise = Normalise(self._size[1], where, self._dtype)
        if options.statistics:
            self._normalise = BandNormalise(options.statistics, self._size[1], where, self._dtype)
        self._buffers = Buffers(self._shape, self._dtype, kept=self._prefetch + 2)
        self._closed = threading.Event()

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """Batches start_step ... len(self) - 1 of this epoch.

        The iterator raises DataError when too many images are unreadable. Leaving it early cancels the
        batches in preparation.

        Raises:
            RuntimeError: the pipeline was closed.
            ValueError: a start_step outside the epoch.
        """
        if self._closed.is_set():
            raise RuntimeError("this pipeline was closed")
        return self._told(self._batches(self._sampler.epoch(epoch, start_step)), start_step)

    def _told(self, batches: Generator[Batch, None, None], start_step: int) -> Generator[Batch, None, None]:
        """The same batches; with the last one it is told what the images lose. None is held on to here."""
        with closing(batches), suppress(StopIteration):  # a rank may have a step less
            for step in range(start_step, len(self)):
                self._bad_images.ends_epoch = step == len(self) - 1
                yield next(batches)
        self._bad_images.tell_losses()

    def _labels(self, ids: NDArray[np.int64]) -> Tensor | None:
        """The labels of samples, (n,) int64 on the device; None for unlabelled data."""
        if self._source.labels is None:
            return None
        labels = torch.from_numpy(self._source.labels[ids].astype(np.int64))
        if self._on_cuda:
            labels = labels.pin_memory()
        return labels.to(self.device, non_blocking=True)

    def _parts(self, count: int) -> list[slice]:
        """A batch of `count` samples in parts small enough to keep all threads busy."""
        size = min(max(count // (4 * self._workers), 1), 16)
        return [slice(start, start + size) for start in range(0, count, size)]

    def _stop_unless_wanted(self, *left: threading.Event) -> None:
        """In a worker thread: raise CancelledError if the batch is no longer wanted.

        That is when the pipeline is closed, an event of `left` is set, or the interpreter waits for its threads to end.
        """
        if self._closed.is_set() or any(event.is_set() for event in left) or not threading.main_thread().is_alive():
            raise CancelledError

    def _normalised(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H, W) on the device, channels_last; on the host in reused memory."""
        if self._on_cuda:
            return self._normalise(pixels.to(self.device))
        batch = self._buffers.take()[: len(pixels)]
        for place, image in zip(batch, pixels, strict=True):
            self._normalise.into(place, image)
        return self._from_host(batch)

    def _from_host(self, batch: Tensor) -> Tensor:
        """A normalised batch of the host's, (B, H, W, C) -> (B, C, H, W) on the device, channels_last."""
        return batch.to(self.device).permute(0, 3, 1, 2)

    @abstractmethod
    def close(self) -> None:
        """Stop the threads and close the source."""

    @abstractmethod
    def _batches(self, steps: Iterator[Share]) -> Generator[Batch, None, None]:
        """The batches of these steps."""


def _numbered(device: torch.device) -> torch.device:
    """The device with its index: the current one may change, and DALI knows none."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
