"""The interface that fills batches with images, and the choice of threads and processes for it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import SettingsError
from spark_fast.pipelines.backends.workers.batch_memory import Place
from spark_fast.pipelines.sampler import Share
from spark_fast.pipelines.sources.bad_images import Loaded

FEW_THREADS = 2  # for so many no process is started: it would cost more memory and seconds at the start than it saves
MOST_PROCESSES = 16  # so many have a thread each and wait for nobody's lock; more would be more messages


class Filled(NamedTuple):
    """A batch whose images are in their places."""

    ids: NDArray[np.int64]
    place: Place
    loaded: list[Loaded]  # what happened to each of its samples


F = TypeVar("F")  # a batch that is being filled


class Filler(Protocol[F]):
    """Fills batches, in any number at once."""

    def start(self, share: Share) -> F:
        """Begin with a batch of these samples; does not wait for it."""
        ...

    def finish(self, filling: F) -> Filled:
        """Wait until a batch is filled. Raises what its first image that failed did."""
        ...

    def abandon(self, fillings: Iterable[F]) -> None:
        """Stop filling these batches; when this returns, nobody writes to their memory any more."""
        ...

    def close(self) -> None:
        """End all threads and processes."""
        ...


def choose_processes(
    asked: int | Literal["auto"], threads: int, cores: int, in_python: bool = False
) -> tuple[int, str]:
    """How many processes the decoding threads of a rank are spread over (0: they stay in this one), and why.

    Args:
        asked: a number, or "auto" for as many as pay.
        threads: decoding threads.
        cores: that this process may use.
        in_python: decoding holds Python's lock for most of its time, so that two threads already wait for each other.
    """
    able = hasattr(os, "memfd_create")
    if asked != "auto":
        if asked and not able:
            raise SettingsError("worker processes need Linux, which has the anonymous shared memory they use: use 0")
        return min(asked, threads), "as asked"
    if not able:
        return 0, "this system has no anonymous shared memory"
    busy = min(threads, cores)
    if busy <= (1 if in_python else FEW_THREADS):
        return 0, f"{threads} threads on {cores} cores hardly wait for Python's lock"
    return min(busy, MOST_PROCESSES), f"{threads} threads on {cores} cores would wait for Python's lock"
