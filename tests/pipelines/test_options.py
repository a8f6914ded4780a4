from __future__ import annotations

import pytest

from spark_fast.cli.train import main
from spark_fast.errors import SettingsError
from spark_fast.pipelines import LoaderOptions, View
from spark_fast.pipelines.options import PIPELINES, bytes_of


def test_the_batch_size_is_enough():
    assert LoaderOptions(batch_size=64).size == (224, 224)
    assert LoaderOptions(64, input_size=(96, 128)).size == (96, 128)


@pytest.mark.parametrize("settings", [{"repeats": 0}, {"centre": 0.0}, {"centre": 1.5}])
def test_views_that_make_no_sense_are_refused(settings):
    with pytest.raises(SettingsError, match="repeats must be 1 or more and centre above 0 and at most 1"):
        View(**settings)


def test_blocks_of_shards_are_counted():
    with pytest.raises(SettingsError, match="shuffle_block must be a number of shards, or 0, got -1"):
        View(shuffle_block=-1)


@pytest.mark.parametrize(
    ("size", "found"),
    [("50GB", 50 * 10**9), ("1.5TB", 1500 * 10**9), ("200GiB", 200 * 2**30), ("64kB", 64_000), ("123", 123),
     ("7 MB", 7_000_000), ("3g", 3 * 10**9)],
)  # fmt: skip
def test_a_size_is_read_with_its_unit(size, found):
    assert bytes_of(size) == found


@pytest.mark.parametrize("size", ["", "GB", "-1GB", "0", "5 apples", "1e9", "5PB"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(SettingsError, match=r"cache_size must be bytes with a unit, such as 500MB, 50GB"):
        LoaderOptions(4, cache_size=size)


@pytest.mark.parametrize(("batch", "world", "take"), [(10, 4, 8), (3, 4, 4), (7, 2, 6)])
def test_a_batch_that_cannot_be_shared_is_refused_with_one_that_can(batch, world, take):
    with pytest.raises(SettingsError, match=f"batch of {batch} .* {world} processes: .* such as {take}$"):
        LoaderOptions(batch, world_size=world)


@pytest.mark.parametrize("batch", [0, -4])
def test_a_batch_of_nothing_is_refused(batch):
    with pytest.raises(SettingsError, match=f"batch of {batch}"):
        LoaderOptions(batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pipeline": "torhc"}, "pipeline 'torhc' is unknown; choose one of auto, torch, dali, ffcv, synthetic"),
        ({"augment_on": "gpu"}, "augmenting on 'gpu' is unknown; choose one of host, device"),
        ({"decode_on": "gpu"}, "decoding on 'gpu' is unknown; choose one of host, device"),
        ({"ffcv_resize": "cubic"}, "ffcv_resize 'cubic' is unknown; choose one of bicubic, area"),
        ({"rank": 5, "world_size": 2}, "rank must be at least 0 and below world_size, 2, got 5"),
        ({"rank": -1}, "rank must be at least 0 and below world_size, 1, got -1"),
        ({"input_size": 0}, "input_size must be 1 pixel or more, got 0"),
        ({"input_size": (32, -1)}, r"input_size must be 1 pixel or more, got \(32, -1\)"),
        ({"in_chans": 0}, "in_chans must be 1 or more, got 0"),
        ({"worker_processes": -1}, "worker_processes must be 0 or more, or auto, got -1"),
        ({"worker_processes": 2, "pipeline": "ffcv"}, "worker_processes needs pipeline torch and decoding on the host"),
        ({"worker_processes": 1, "decode_on": "device"}, "worker_processes needs pipeline torch and decoding on"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(settings, message):
    with pytest.raises(SettingsError, match=message):
        LoaderOptions(4, **settings)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("work", ["augment_on", "decode_on"])
def test_only_torch_leaves_work_to_the_device(pipeline, work):
    if pipeline in ("dali", "ffcv"):
        with pytest.raises(SettingsError, match=f"pipeline {pipeline} cannot use the device for decoding"):
            LoaderOptions(6, pipeline, **{work: "device"})
    else:
        assert LoaderOptions(6, pipeline, **{work: "device"}).on_device


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--pipeline=foo", "pipeline 'foo' is unknown; choose one of auto, torch, dali, ffcv, synthetic"),
        ("--bs=0", "--batch_size must be positive, got 0"),
    ],
)
def test_a_mistake_in_the_options_ends_the_command_with_exit_code_2(image_folder, capsys, flag, message):
    assert main(["x", f"--data_path={image_folder(4)}", flag]) == SettingsError.exit_code == 2
    assert message in capsys.readouterr().err
