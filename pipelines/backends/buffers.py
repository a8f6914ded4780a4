"""Memory for batches on the host, used again once nobody holds a batch made of it.

A batch of 64 images is 38 MB. Fresh memory of that size is mapped by the kernel page by page, which costs seven
times what normalising into it does. A ring of fixed buffers would be as fast, but would overwrite batches that the
consumer still holds.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def fresh(size: int) -> NDArray[np.uint8]:
    """Memory of this process, (size,) uint8."""
    return np.empty(size, np.uint8)


class Buffers:
    """Tensors of one shape, (*shape,), and one dtype.

    Args:
        kept: memory of so many tensors is kept while nobody holds them.
        allocate: bytes -> memory, (bytes,) uint8.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        kept: int,
        allocate: Callable[[int], NDArray[np.uint8]] = fresh,
    ) -> None:
        self._shape, self._dtype, self._allocate = shape, dtype, allocate
        self._idle: deque[NDArray[np.uint8]] = deque(maxlen=kept)

    def take(self) -> Tensor:
        """A tensor, (*shape,), of undefined content. Its memory comes back by itself when no view of it is left."""
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = self._allocate(math.prod(self._shape) * self._dtype.itemsize)
        lent = memory[:]  # an object of its own, which lives as long as the tensors that torch makes of it
        weakref.finalize(lent, self._idle.append, memory).atexit = False
        return torch.from_numpy(lent).view(self._dtype).view(self._shape)
