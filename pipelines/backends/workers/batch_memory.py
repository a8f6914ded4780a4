"""Where the images of a batch are put together: on the host, in memory that is used again and again.

A batch's memory is one piece: its pixels, then where the crops lie in their cells. So it can be shared with another
process whole. For CUDA it is pinned; then it may only be filled again when its copy to the device is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spark_fast.pipelines.backends.buffers import Buffers, fresh

ALIGNED = 64  # bytes
CROP = 3  # numbers of a crop in its cell, see `DeviceAugment.put`


@dataclass
class Place:
    """Memory of one batch of B images."""

    pixels: Tensor  # (B, H, W, C)
    crops: Tensor  # (B, 3) int64
    slot: Slot | None = None  # pinned memory that these are a part of


class BatchMemory(Protocol):
    """Lends places for batches."""

    def take(self, count: int) -> Place:
        """A place for `count` images, of undefined content."""
        ...

    def give_back(self, place: Place) -> None:
        """Its batch is complete. Pinned memory is filled again once its copy to the device is done."""
        ...


@dataclass(frozen=True)
class Layout:
    """How the batches of a pipeline lie in memory."""

    shape: tuple[int, ...]  # (B, H, W, C) of the largest batch
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes of a batch."""
        return self._pixel_bytes + 8 * CROP * self.shape[0]

    @property
    def _pixel_bytes(self) -> int:
        return -(-math.prod(self.shape) * self.dtype.itemsize // ALIGNED) * ALIGNED

    def views(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, H, W, C) and crops (B, 3) int64, as views of `memory`, (size,) uint8."""
        pixels = memory[: math.prod(self.shape) * self.dtype.itemsize].view(self.dtype).view(self.shape)
        return pixels, memory[self._pixel_bytes :].view(torch.int64).view(-1, CROP)


class HostMemory:
    """Places that come back by themselves when nobody holds a batch made of them; `allocate` makes (bytes,) uint8."""

    def __init__(self, layout: Layout, kept: int, allocate: Callable[[int], NDArray[np.uint8]] = fresh) -> None:
        self._layout = layout
        self.buffers = Buffers((layout.size,), torch.uint8, kept, allocate)

    def take(self, count: int) -> Place:
        """See `BatchMemory`."""
        pixels, crops = self._layout.views(self.buffers.take())
        return Place(pixels[:count], crops[:count])

    def give_back(self, place: Place) -> None:
        """Nothing to do."""


class Slot:
    """Pinned memory of one batch, (size,) uint8, refilled once its copy to the CUDA device is done."""

    def __init__(self, layout: Layout, memory: Tensor) -> None:
        self.pixels, self.crops = layout.views(memory)
        self.copied = torch.cuda.Event()


class PinnedMemory:
    """Places for batches that are copied to a CUDA device; `allocate` makes pinned memory, (bytes,) uint8."""

    def __init__(self, layout: Layout, allocate: Callable[[int], Tensor]) -> None:
        self._layout, self._allocate = layout, allocate
        self._idle: list[Slot] = []

    def take(self, count: int) -> Place:
        """The longest idle slot; not the one just given back, so that its copy has time to finish."""
        slot = self._idle.pop(0) if len(self._idle) > 1 else Slot(self._layout, self._allocate(self._layout.size))
        slot.copied.synchronize()
        return Place(slot.pixels[:count], slot.crops[:count], slot)

    def give_back(self, place: Place) -> None:
        """See `BatchMemory`."""
        assert place.slot is not None
        self._idle.append(place.slot)


def pinned(size: int) -> Tensor:
    """Pinned memory of this process, (size,) uint8."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
