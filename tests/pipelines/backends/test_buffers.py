from __future__ import annotations

import numpy as np
import pytest
import torch

from spark_fast.pipelines.backends.buffers import Buffers
from tests.pipelines.building import build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_comes_back_when_the_last_view_is_gone(dtype):
    buffers = Buffers((2, 3, 4), dtype, kept=2)
    batch = buffers.take()
    assert batch.shape == (2, 3, 4)
    assert batch.dtype == dtype
    address = batch.data_ptr()
    view = batch.permute(2, 0, 1)[1]
    del batch
    assert buffers.take().data_ptr() != address  # the view is still in use
    del view
    assert address in {buffers.take().data_ptr() for _ in range(2)}


def test_a_batch_in_use_keeps_its_content():
    buffers = Buffers((1000,), torch.float32, kept=3)
    held = [buffers.take().fill_(number) for number in range(10)]
    assert len({batch.data_ptr() for batch in held}) == 10
    array = held[3].numpy()
    held.clear()
    for _ in range(10):
        buffers.take().fill_(-1)
    assert (array == 3).all()


def test_no_more_idle_memory_is_kept_than_asked():
    buffers = Buffers((10,), torch.float32, kept=3)
    held = [buffers.take() for _ in range(10)]
    held.clear()
    assert len(buffers._idle) == 3


def test_batches_of_a_pipeline_take_turns_in_few_buffers_and_kept_ones_stay(image_folder):
    pipeline = build(image_folder(), batch_size=4, input_size=32, prefetch=2)
    kept = list(pipeline.epoch(0))
    copies = [batch.images.clone() for batch in kept]
    addresses = {batch.images.data_ptr() for epoch in range(1, 6) for batch in pipeline.epoch(epoch)}
    assert len(addresses) <= 4
    assert all(np.array_equal(batch.images, copy) for batch, copy in zip(kept, copies, strict=True))
    pipeline.close()


def test_threads_that_hold_on_to_their_work_do_not_hold_the_memory(image_folder, monkeypatch):
    pipeline = build(image_folder(), batch_size=4, input_size=32, prefetch=2)
    pool = pipeline._filler.pool
    work, submit = [], pool.submit
    monkeypatch.setattr(pool, "submit", lambda *call: work.append(call) or submit(*call))
    addresses = {batch.images.data_ptr() for epoch in range(6) for batch in pipeline.epoch(epoch)}
    assert len(addresses) <= 4
    assert len(work) >= 36
    pipeline.close()
