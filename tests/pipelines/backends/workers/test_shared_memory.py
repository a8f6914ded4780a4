"""Memory that another process can map, which has no name and goes with its last user."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from spark_fast.pipelines.backends.workers.shared_memory import SharedBlocks, mapped, new_file


def test_what_one_mapping_writes_the_other_reads():
    file = new_file(100)
    one, other = mapped(file, 100), mapped(file, 100)
    os.close(file)
    one[7] = 5
    assert other.sum() == 5


def test_a_block_is_found_by_its_pixels_and_dropped_with_them():
    before = len(list(Path("/proc/self/fd").iterdir()))
    blocks = SharedBlocks()
    memory, other = blocks.allocate(1000), blocks.allocate(1000)
    block = blocks.of(torch.from_numpy(memory).view(10, 100)[:4])
    assert (block.number, block.size) == (1, 1000)
    again = mapped(block.file, block.size)
    again[3] = 9
    assert memory[3] == 9
    del memory, again
    assert len(blocks) == 1
    assert list(blocks.dropped) == [1]
    del other
    assert len(list(Path("/proc/self/fd").iterdir())) == before
