from __future__ import annotations

import numpy as np
import pytest
import torch

from spark_fast.errors import DataError, SettingsError
from spark_fast.pipelines.backends.torch_pipeline import TorchPipeline
from spark_fast.pipelines.build import choose_pipeline, holds_split
from spark_fast.pipelines.sampler import block_order
from spark_fast.pipelines.sources.beton import CHECKS, RAW, BetonSource
from spark_fast.pipelines.sources.shards import ShardSource
from tests.pipelines.building import build
from tests.pipelines.comparing import batches
from tests.pipelines.pictures import jpeg
from tests.pipelines.sources.ten_images import write_all

BACKENDS = [
    pytest.param({}, id="torch"),
    pytest.param({"augment_on": "device"}, id="device_augment"),
    pytest.param({"decode_on": "device"}, id="device_decode"),
    pytest.param({"pipeline": "dali"}, id="dali", marks=pytest.mark.dali),
    pytest.param({"pipeline": "ffcv"}, id="ffcv", marks=pytest.mark.ffcv),
]


def test_a_batch_larger_than_the_data_is_refused_with_both_numbers(image_folder):
    root = image_folder()
    with pytest.raises(DataError, match=r"batch of 25 is larger than the 24 images of .*batch_size of 24 or less"):
        build(root, batch_size=25)
    pipeline = build(root, batch_size=24, input_size=32)
    assert len(pipeline) == 1
    pipeline.close()


def test_no_data_path_is_refused():
    with pytest.raises(SettingsError, match="no data_path: give a folder"):
        build(None, batch_size=4)


def test_auto_takes_the_default_for_jpegs_and_says_so(image_folder, caplog):
    with caplog.at_level("INFO", "spark_fast.pipelines"):
        pipeline = build(image_folder(), batch_size=4, input_size=32)
    assert isinstance(pipeline, TorchPipeline)
    assert "pipeline torch: it decodes JPEGs faster" in caplog.text
    pipeline.close()


@pytest.mark.parametrize("installed", [True, False])
def test_auto_takes_ffcv_for_raw_pixels_where_it_is_installed(monkeypatch, installed):
    def require(purpose):
        if not installed:
            raise SettingsError(f"{purpose} needs FFCV: pip install it")

    monkeypatch.setattr("spark_fast.pipelines.build.require_ffcv", require)
    source = object.__new__(BetonSource)
    source.checks = np.zeros(3, CHECKS)
    assert choose_pipeline(source)[0] == "torch"
    source.checks["mode"][1] = RAW
    name, why = choose_pipeline(source)
    assert name == ("ffcv" if installed else "torch")
    assert "raw pixels" in why
    assert ("pip install" in why) != installed


def data_for(settings, image_folder, beton_folder):
    return beton_folder() if settings.get("pipeline") == "ffcv" else image_folder()


@pytest.mark.parametrize("settings", BACKENDS)
@pytest.mark.parametrize("batch_size", [10, 32])  # of 24 images
def test_in_order_every_image_comes_once_whatever_the_number_of_ranks(image_folder, beton_folder, settings, batch_size):
    root = data_for(settings, image_folder, beton_folder)
    asked = {"in_order": True, "augment": False, "batch_size": batch_size, **settings}
    got = batches(root, **asked)
    assert [i for batch in got for i in batch.ids.tolist()] == list(range(24))
    assert [len(batch.images) for batch in got] == [len(b.labels) for b in got] == [10, 10, 4][: len(got)] or [24]
    ranks = [batches(root, rank=rank, world_size=2, **asked) for rank in range(2)]
    by_id = {i: image for rank in ranks for b in rank for i, image in zip(b.ids.tolist(), b.images, strict=True)}
    assert len(by_id) == sum(len(b.ids) for rank in ranks for b in rank) == 24
    together = torch.stack([by_id[i] for i in range(24)])
    assert torch.equal(together, torch.cat([batch.images for batch in got]))


def test_a_rank_that_has_nothing_of_the_last_batch_ends_a_step_earlier(image_folder):
    root = image_folder(9)
    sizes = [
        [len(b.images) for b in batches(root, in_order=True, batch_size=8, rank=r, world_size=4)] for r in range(4)
    ]
    assert sizes == [[2], [2], [2], [2, 1]]


@pytest.mark.parametrize("settings", BACKENDS)
def test_repeated_draws_of_a_sample_differ_and_are_those_of_other_epochs_without_repeats(
    image_folder, beton_folder, settings
):
    root = data_for(settings, image_folder, beton_folder)
    asked = {"batch_size": 12, **settings}
    (first, second) = batches(root, epoch=1, repeats=3, **asked)
    ids = torch.cat([first.ids, second.ids])
    images = torch.cat([first.images, second.images])
    assert ids.view(8, 3).eq(ids.view(8, 3)[:, :1]).all()
    assert len(ids.unique()) == 8
    for copy in range(3):
        plain = batches(root, epoch=3 + copy, **asked)
        by_id = {i: image for b in plain for i, image in zip(b.ids.tolist(), b.images, strict=True)}
        assert torch.equal(images[copy::3], torch.stack([by_id[i] for i in ids[copy::3].tolist()]))
    assert not torch.equal(images[0::3], images[1::3])


@pytest.mark.parametrize("settings", [{"pipeline": "torch"}, {"pipeline": "torch", "decode_on": "device"}])
def test_images_and_files_are_read_up_to_the_size_that_is_allowed(tmp_path, settings):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "large.jpg").write_bytes(jpeg(1, 1000, 1100))  # 1.1 million
    for max_pixels, substituted, limit in ((1, 1, 256), (2, 0, 256), (1000, 0, 4000)):
        pipeline = build(tmp_path, batch_size=2, input_size=32, max_pixels=max_pixels, **settings)
        list(pipeline.epoch(0))
        assert pipeline.bad_images.substituted == substituted
        assert pipeline._source.max_file_bytes == limit * 2**20
        pipeline.close()


def test_blocks_of_shards_shuffle_shards_alone(image_folder, tmp_path):
    with pytest.raises(SettingsError, match=r"shuffle_block is for shards, which .*images is not: convert it"):
        build(image_folder(), batch_size=4, shuffle_block=1)
    source = write_all(tmp_path / "shards")
    pipeline = build(source, batch_size=2, input_size=32, shuffle_block=1)
    ids = [batch.ids.tolist() for batch in pipeline.epoch(3)]
    shards = ShardSource(source)
    assert [i for batch in ids for i in batch] == block_order(shards.shards(), 1, 0, 3).tolist()
    assert [batch.ids.tolist() for batch in pipeline.epoch(3, 2)] == ids[2:]
    shards.close()
    pipeline.close()


def test_a_split_is_looked_for_where_the_path_says(image_folder, tmp_path):
    root = image_folder()
    write_all(tmp_path / "shards")
    assert holds_split(str(root), "train")
    assert not holds_split(str(root), "val")
    pytest.importorskip("fsspec")
    assert holds_split(f"file://{tmp_path}", "shards")
    assert not holds_split(f"file://{tmp_path}/shards", "val")
