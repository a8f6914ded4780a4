"""Memory that worker processes fill: without a name, handed over as an open file, so that nothing stays behind.

It counts as memory of the processes that map it, does not lie in /dev/shm, and is gone with the last of them.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Block(NamedTuple):
    """A piece of shared memory."""

    number: int
    file: int  # descriptor
    size: int  # bytes


def new_file(size: int) -> int:
    """Descriptor of `size` bytes of zeros, not inherited by programs that are started."""
    file = os.memfd_create("spark_fast", os.MFD_CLOEXEC)
    os.ftruncate(file, size)
    return file


def mapped(file: int, size: int) -> NDArray[np.uint8]:
    """The memory behind a descriptor, (size,) uint8."""
    return np.frombuffer(mmap.mmap(file, size), np.uint8)


class SharedBlocks:
    """The blocks in use, by where they are mapped in this process."""

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}
        self._made = 0
        self.dropped: deque[int] = deque()  # numbers of blocks that are no more, for the processes to forget

    def __len__(self) -> int:
        return len(self._blocks)

    def allocate(self, size: int) -> NDArray[np.uint8]:
        """A new block, (size,) uint8; it is dropped when nobody holds this array."""
        file = new_file(size)
        memory = mapped(file, size)
        self._made += 1
        self._blocks[memory.ctypes.data] = Block(self._made, file, size)
        weakref.finalize(memory, self._drop, memory.ctypes.data).atexit = False
        return memory

    def of(self, pixels: Tensor) -> Block:
        """The block that begins with these pixels, a tensor of any shape."""
        return self._blocks[pixels.data_ptr()]

    def _drop(self, address: int) -> None:
        block = self._blocks.pop(address)
        os.close(block.file)
        self.dropped.append(block.number)


def pinned_by(blocks: SharedBlocks) -> Callable[[int], Tensor]:
    """Allocates blocks in page-locked memory, which CUDA copies asynchronously: bytes -> (size,) uint8."""

    def allocate(size: int) -> Tensor:
        memory = blocks.allocate(size)
        address, cudart = memory.ctypes.data, torch.cuda.cudart()
        torch.cuda.check_error(int(cudart.cudaHostRegister(address, size, 0)))
        weakref.finalize(memory, partial(cudart.cudaHostUnregister, address)).atexit = False
        return torch.from_numpy(memory)

    return allocate
