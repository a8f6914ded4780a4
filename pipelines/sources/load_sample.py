"""One sample from bytes to its place in the batch, and what happens when its image cannot be read.

An unreadable image must not end a training run of days, and must not go unnoticed either: its place is
taken by the next readable image in the listing, a function of the data alone, and the caller is told.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spark_fast.errors import DataError, ImageError
from spark_fast.pipelines.sources.folder import Source
from spark_fast.pipelines.transforms.crops import Augmentation, Box
from spark_fast.pipelines.transforms.decode import decode

SUBSTITUTES = 16  # how many following images are tried
RETRY_SECONDS = (0.05, 0.2)  # pauses after which a read is tried again: network file systems stumble

T = TypeVar("T")


class Loaded(NamedTuple):
    """What happened to one sample."""

    converted: bool  # the image is no colour JPEG
    substituted: str | None  # why the sample's own image could not be read


def load_sample(
    source: Source,
    sample: int,
    draws: Sequence[float],
    augmentation: Augmentation,
    put: Callable[[NDArray[np.uint8], Box, bool], object],
) -> Loaded:
    """Decode a sample, or the image that stands in, and `put` pixels (H, W, 3), box and flip where they belong.

    Raises DataError when neither the sample nor any of its substitutes can be read.
    """

    def load(_: int, data: bytes | memoryview) -> bool:
        image, converted = decode(data)
        height, width = image.shape[:2]
        put(image, augmentation.box(draws, height, width), augmentation.flips(draws))
        return converted

    return Loaded(*first_readable(source, sample, load))


def first_readable(source: Source, sample: int, use: Callable[[int, bytes | memoryview], T]) -> tuple[T, str | None]:
    """What `use(i, data)` makes of a sample, or of the first image after it from which it raises no ImageError.

    Returns that, and why the sample's own image could not be read (None: it could). Raises DataError when
    neither the sample nor any of its substitutes can be read.
    """
    reason: str | None = None
    for attempt in range(1 + SUBSTITUTES):
        i = (sample + attempt) % len(source)
        try:
            return use(i, read_patiently(source, i)), reason
        except (ImageError, OSError) as error:
            reason = reason or str(error)
    raise DataError(
        f"image {sample} ({source.name(sample)}) cannot be read ({reason}), and neither can the {SUBSTITUTES}"
        " images after it: is the storage still there?"
    )


def load_each(
    source: Source, ids: NDArray[np.int64], load: Callable[[int, int], T], stop: Callable[[], bool]
) -> list[T]:
    """In a thread: `load(place, sample)` for each of these samples.

    Raises CancelledError when `stop()` says that nobody waits any more or the interpreter is ending (which waits
    for its threads: do not make it wait), DataError as `load` does, RuntimeError naming the image for all else.
    """
    loaded = []
    for place, sample in enumerate(ids.tolist()):
        if stop() or not threading.main_thread().is_alive():
            raise CancelledError
        try:
            loaded.append(load(place, sample))
        except DataError:
            raise
        except Exception as error:
            raise RuntimeError(f"while loading image {sample} ({source.name(sample)}): {error!r}") from error
    return loaded


def thread_parts(count: int, workers: int) -> list[slice]:
    """A batch in parts small enough to keep all threads busy."""
    size = min(max(count // (4 * workers), 1), 16)
    return [slice(start, start + size) for start in range(0, count, size)]


def read_patiently(source: Source, i: int) -> bytes | memoryview:
    """`source.read(i)`, tried again after a pause when the storage stumbles; raises what the last try did."""
    for pause in RETRY_SECONDS:
        try:
            return source.read(i)
        except OSError:  # noqa: PERF203
            time.sleep(pause)
    return source.read(i)


def labels_on(device: torch.device, source: Source, ids: NDArray[np.int64]) -> Tensor | None:
    """The labels of samples, (n,) int64 on `device`; None for unlabelled data."""
    if source.labels is None:
        return None
    labels = torch.from_numpy(source.labels[ids].astype(np.int64))
    if device.type == "cuda":
        labels = labels.pin_memory()
    return labels.to(device, non_blocking=True)
