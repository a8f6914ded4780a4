from __future__ import annotations

import numpy as np
import pytest
import torch

from spark_fast.errors import DataError
from spark_fast.pipelines import build_pipeline
from spark_fast.pipelines.backends.synthetic import IMAGES
from spark_fast.pipelines.backends.torch_threads import TorchPipeline
from spark_fast.pipelines.build import choose_pipeline
from spark_fast.pipelines.sources.beton import CHECKS, RAW, BetonSource


def test_a_batch_larger_than_the_data_is_refused_with_both_numbers(image_folder):
    root = image_folder()
    with pytest.raises(DataError, match=r"batch of 25 is larger than the 24 images of .*batch_size of 24 or less"):
        build_pipeline(root, batch_size=25)
    pipeline = build_pipeline(root, batch_size=24, input_size=32)
    assert len(pipeline) == 1
    pipeline.close()


@pytest.mark.parametrize(("batch", "world", "take"), [(10, 4, 8), (3, 4, 4), (7, 2, 6)])
def test_a_batch_that_cannot_be_shared_is_refused_with_one_that_can(image_folder, batch, world, take):
    with pytest.raises(DataError, match=f"batch of {batch} .* {world} processes: .* such as {take}$"):
        build_pipeline(image_folder(), batch_size=batch, world_size=world)


@pytest.mark.parametrize("batch", [0, -4])
def test_a_batch_of_nothing_is_refused(image_folder, batch):
    with pytest.raises(DataError, match=f"batch of {batch}"):
        build_pipeline(image_folder(), batch_size=batch)


def test_unknown_pipelines_are_refused_with_the_known_ones(image_folder):
    with pytest.raises(DataError, match="'torhc' is unknown; there are: auto, torch, dali, ffcv, synthetic"):
        build_pipeline(image_folder(), pipeline="torhc", batch_size=4)


def test_no_data_path_is_refused():
    with pytest.raises(DataError, match="no data_path: name a folder"):
        build_pipeline(None, batch_size=4)


def synthetic(**settings: object) -> list:
    settings = {"batch_size": 8, "input_size": (32, 64), "synthetic_samples": 50} | settings
    pipeline = build_pipeline(None, pipeline="synthetic", **settings)  # type: ignore[arg-type]
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
    pipeline = build_pipeline(None, pipeline="synthetic", batch_size=8, input_size=32, synthetic_samples=50)
    whole, tail = list(pipeline.epoch(0)), list(pipeline.epoch(0, 4))
    assert torch.equal(torch.stack([b.images for b in whole[4:]]), torch.stack([b.images for b in tail]))
    with pytest.raises(ValueError, match="start_step 7"):
        pipeline.epoch(0, 7)


def test_synthetic_ranks_share_the_batches_of_one():
    whole = synthetic()
    ranks = [synthetic(rank=rank, world_size=2) for rank in range(2)]
    for batch, first, second in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))
        assert torch.equal(batch.ids, torch.cat([first.ids, second.ids]))


def test_synthetic_data_smaller_than_a_batch_are_refused():
    with pytest.raises(DataError, match="larger than the 5 images of synthetic_samples"):
        build_pipeline(None, pipeline="synthetic", batch_size=8, synthetic_samples=5)


def test_auto_takes_the_default_for_jpegs_and_says_so(image_folder, caplog):
    with caplog.at_level("INFO", "spark_fast.pipelines"):
        pipeline = build_pipeline(image_folder(), batch_size=4, input_size=32)
    assert isinstance(pipeline, TorchPipeline)
    assert "pipeline torch: it decodes JPEGs faster" in caplog.text
    pipeline.close()


@pytest.mark.parametrize("installed", [True, False])
def test_auto_takes_ffcv_for_raw_pixels_where_it_is_installed(monkeypatch, installed):
    def require(purpose):
        if not installed:
            raise DataError(f"{purpose} needs FFCV: pip install it")

    monkeypatch.setattr("spark_fast.pipelines.build.require_ffcv", require)
    source = object.__new__(BetonSource)
    source.checks = np.zeros(3, CHECKS)
    assert choose_pipeline(source)[0] == "torch"
    source.checks["mode"][1] = RAW
    name, why = choose_pipeline(source)
    assert name == ("ffcv" if installed else "torch")
    assert "raw pixels" in why
    assert ("pip install" in why) != installed
