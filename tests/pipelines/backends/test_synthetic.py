from __future__ import annotations

import pytest
import torch

from spark_fast.errors import DataError
from spark_fast.pipelines.backends.synthetic import IMAGES
from tests.pipelines.building import build


def synthetic(**settings: object) -> list:
    settings = {"batch_size": 8, "input_size": (32, 64), "synthetic_samples": 50} | settings
    pipeline = build(None, pipeline="synthetic", **settings)  # type: ignore[arg-type]
    assert len(pipeline) == 6
    return list(pipeline.epoch(1))


def test_the_synthetic_pipeline_keeps_the_contract():
    batches = synthetic(dtype=torch.bfloat16)
    assert len({i for batch in batches for i in batch.ids.tolist()}) == 48
    for images, labels, ids in batches:
        assert images.shape == (8, 3, 32, 64)
        assert images.dtype == torch.bfloat16
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.float().std() > 0.5
        assert labels.tolist() == (ids % IMAGES).tolist()
    pipeline = build(None, pipeline="synthetic", batch_size=8, input_size=32, synthetic_samples=50)
    whole, tail = list(pipeline.epoch(0)), list(pipeline.epoch(0, 4))
    assert all(pipeline.labels[batch.ids].tolist() == batch.labels.tolist() for batch in whole)
    assert torch.equal(torch.stack([b.images for b in whole[4:]]), torch.stack([b.images for b in tail]))
    with pytest.raises(ValueError, match="start_step 7"):
        pipeline.epoch(0, 7)
    batches = pipeline.epoch(0)
    pipeline.close()
    for read in (lambda: pipeline.epoch(0), lambda: next(batches)):
        with pytest.raises(RuntimeError, match="this pipeline was closed"):
            read()


@pytest.mark.parametrize("channels", [1, 2, 12])
def test_synthetic_images_have_as_many_channels_as_asked_each_its_own(channels):
    images = synthetic(in_chans=channels)[0].images
    assert images.shape == (8, channels, 32, 64)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.mean().abs() < 0.2
    assert 0.7 < images.std() < 1.3
    assert len(images.mean((0, 2, 3)).unique()) == channels


def test_synthetic_ranks_share_the_batches_of_one():
    whole = synthetic()
    ranks = [synthetic(rank=rank, world_size=2) for rank in range(2)]
    for batch, first, second in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))
        assert torch.equal(batch.ids, torch.cat([first.ids, second.ids]))


def test_synthetic_data_smaller_than_a_batch_are_refused():
    with pytest.raises(DataError, match="larger than the 5 images of synthetic_samples"):
        build(None, pipeline="synthetic", batch_size=8, synthetic_samples=5)
