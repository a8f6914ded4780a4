"""How a batch lies in memory, and when that memory is lent again."""

from __future__ import annotations

import pytest
import torch

from spark_fast.pipelines.backends.workers.batch_memory import HostMemory, Layout


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32, torch.bfloat16])
def test_pixels_and_crops_share_a_piece_of_memory_and_do_not_touch(dtype):
    layout = Layout((3, 5, 7, 2), dtype)
    memory = torch.zeros(layout.size, dtype=torch.uint8)
    pixels, crops = layout.views(memory)
    assert (pixels.shape, pixels.dtype) == ((3, 5, 7, 2), dtype)
    assert (crops.shape, crops.dtype) == ((3, 3), torch.int64)
    assert pixels.data_ptr() == memory.data_ptr()
    crops.fill_(-1)
    assert not pixels.view(torch.uint8).any()
    pixels.view(torch.uint8).fill_(1)
    assert (crops == -1).all()


def test_a_smaller_batch_gets_the_first_places():
    memory = HostMemory(Layout((6, 2, 2, 3), torch.float32), kept=2)
    place = memory.take(4)
    assert place.pixels.shape == (4, 2, 2, 3)
    assert place.crops.shape == (4, 3)
    assert place.slot is None


def test_a_place_is_lent_again_when_its_pixels_are_gone_though_somebody_keeps_the_crops_of_another():
    memory = HostMemory(Layout((2, 2, 2, 3), torch.uint8), kept=2)
    first, second = memory.take(2), memory.take(2)
    address = first.pixels.data_ptr()
    del first
    assert memory.take(2).pixels.data_ptr() == address
    assert second.pixels.data_ptr() != address
