"""Messages between the trainer's process and the worker processes; a batch's pixels are never sent."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spark_fast.pipelines.backends.image_loader import ImageLoader
from spark_fast.pipelines.backends.workers.batch_memory import Layout
from spark_fast.pipelines.sources.bad_images import Loaded

PLAIN = Loaded(False, None)  # the result of nearly every image, which is therefore not sent


class Setup(NamedTuple):
    """What all worker processes of a pipeline know."""

    images: ImageLoader
    layout: Layout
    seed: int


class Ready(NamedTuple):
    """A worker process's first message."""

    pid: int


class Lend(NamedTuple):
    """A block of shared memory; its file follows."""

    block: int
    size: int


class Forget(NamedTuple):
    """A block is no longer used: unmap it."""

    block: int


class Order(NamedTuple):
    """Part of a batch: rows `first` to `first + n` of what lies in a block are these samples."""

    batch: int
    first: int
    block: int
    ids: NDArray[np.int64]  # (n,)
    draw_ids: NDArray[np.int64]  # (n,), see `Share`


class Cancel(NamedTuple):
    """A batch is no longer needed; its orders are answered all the same."""

    batch: int


class Failed(NamedTuple):
    """The first image of an order that raised an exception."""

    error: Exception  # a DataError, or a RuntimeError that names the image
    trace: str  # where, as text


class Answer(NamedTuple):
    """An order is done, or as far as it goes."""

    batch: int
    first: int
    loaded: dict[int, Loaded]  # of the order's rows, from 0, all but PLAIN ones
    failed: Failed | None
