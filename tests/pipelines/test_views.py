"""What evaluation asks of the pipelines: another split, every sample once and in order, repeated views."""

from __future__ import annotations

import shutil

import pytest
import torch

from spark_fast.errors import DataError
from spark_fast.pipelines import build_pipeline
from tests.pipelines.comparing import batches

BACKENDS = [
    pytest.param({}, id="torch"),
    pytest.param({"augment_on": "device"}, id="device_augment"),
    pytest.param({"decode_on": "device"}, id="device_decode"),
    pytest.param({"pipeline": "dali"}, id="dali", marks=pytest.mark.dali),
    pytest.param({"pipeline": "ffcv"}, id="ffcv", marks=pytest.mark.ffcv),
]


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
def test_repeated_views_of_a_sample_differ_and_are_those_of_other_epochs_of_an_order_without(
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


def test_the_validation_split_is_read_and_its_absence_is_told(image_folder, tmp_path):
    root = image_folder()
    with pytest.raises(DataError, match=r"images holds no folder val/, which should lie beside train/"):
        batches(root, split="val")
    with pytest.raises(DataError, match="holds no folder val/"):
        batches(root / "train", split="val")
    shutil.copytree(image_folder(8, name="other") / "train", root / "val")
    (root / "train").rename(root / "test")
    val = build_pipeline(root, split="val", batch_size=4, input_size=32)
    all_of_it = build_pipeline(root / "val", split="all", batch_size=4, input_size=32)
    assert (val.num_samples, val.num_classes, val.classes) == (8, 3, ["n0000", "n0001", "n0002"])
    assert all_of_it.num_samples == 8
    val.close(), all_of_it.close()


def test_a_file_is_no_place_for_a_validation_split(image_folder):
    root = image_folder(4)
    (root / "list.txt").write_text("".join(f"train/n{i * 3 // 4:04d}/{i:04d}.JPEG {i}\n" for i in range(4)))
    with pytest.raises(DataError, match=r"list.txt holds no folder val/"):
        batches(root / "list.txt", split="val", batch_size=2)
    listed = build_pipeline(root / "list.txt", batch_size=2, input_size=32)
    assert (listed.num_classes, listed.classes) == (4, [])
    listed.close()


@pytest.mark.parametrize("settings", [{"repeats": 0}, {"centre": 0.0}, {"centre": 1.5}])
def test_views_that_make_no_sense_are_refused(image_folder, settings):
    with pytest.raises(DataError, match="repeats must be 1 or more and centre above 0 and at most 1"):
        batches(image_folder(), **settings)
