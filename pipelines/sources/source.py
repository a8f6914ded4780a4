"""What every source of images promises, and how it is read when the storage fails for a moment."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import DataError

RETRY_SECONDS = (0.05, 0.2)  # pauses after which a read is tried again: network file systems fail for a moment


class Source(Protocol):
    """A numbered set of encoded images."""

    labels: NDArray[np.int32] | None  # (n,), None for unlabelled data
    classes: list[str]  # name of each label, empty when not known

    def __len__(self) -> int:
        """How many images there are."""
        ...

    def read(self, i: int) -> bytes | memoryview:
        """The encoded image; raises OSError or ImageError."""
        ...

    def name(self, i: int) -> str:
        """What to call the image in a message."""
        ...

    def fingerprint(self) -> str:
        """Of the listing of the images: equal wherever they lie, and for what was converted; "" if not known."""
        ...

    def close(self) -> None:
        """Close open files."""
        ...


def num_classes(source: Source) -> int:
    """How many classes the labels tell apart; 0 for unlabelled data."""
    if source.labels is None:
        return 0
    return len(source.classes) or int(source.labels.max()) + 1


def empty_classes(source: Source) -> set[str]:
    """Names of the classes that no image has."""
    if source.labels is None:
        return set()
    counts = np.bincount(source.labels, minlength=len(source.classes))
    return {name for name, count in zip(source.classes, counts, strict=False) if not count}


def read_patiently(source: Source, i: int) -> bytes | memoryview:
    """`source.read(i)`, tried again after a pause when the storage fails; raises what the last try did."""
    for pause in RETRY_SECONDS:
        try:
            return source.read(i)
        except OSError:  # noqa: PERF203
            time.sleep(pause)
    return source.read(i)


@contextmanager
def naming_image(source: Source, sample: int) -> Iterator[None]:
    """Turn any exception but DataError into a RuntimeError that names the image."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise RuntimeError(f"while loading image {sample} ({source.name(sample)}): {error!r}") from error
