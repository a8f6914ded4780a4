"""Statistics of raw folders: NumPy's of the sample, the same whoever measures, and said."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from spark_fast.errors import DataError, SettingsError
from spark_fast.pipelines import LoaderOptions
from spark_fast.pipelines.backends import measure as measuring
from spark_fast.pipelines.build import build_pipeline, measure_statistics
from tests.pipelines.bands import bands, npy_of


@pytest.fixture
def arrays(tmp_path):
    """24 files of 3 channels of 16 bits, and their pixels, (n, 3)."""
    images = [bands(i, 20, 30, 3) for i in range(24)]
    for i, pixels in enumerate(images):
        (tmp_path / f"{i:02d}.npy").write_bytes(npy_of(pixels))
    return tmp_path, np.concatenate([pixels.reshape(-1, 3) for pixels in images]).astype(np.float64)


def measured(path, scale="dtype", **options):
    found = measure_statistics(path, LoaderOptions(4, in_chans=options.pop("in_chans", 3), scaling=scale, **options))
    assert found is not None
    return found


@pytest.mark.parametrize("scale", ["dtype", "percentile", "none"])
def test_mean_deviation_and_percentiles_are_numpys_of_the_scaled_numbers(arrays, scale):
    path, pixels = arrays
    found = measured(path, scale)
    low, high = np.percentile(pixels, [0.1, 99.9], axis=0)
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-12)
    in_range = {"dtype": pixels / 65535, "none": pixels, "percentile": ((pixels - low) / (high - low)).clip(0, 1)}[
        scale
    ]
    np.testing.assert_allclose(found.mean, in_range.mean(0), rtol=1e-10)
    np.testing.assert_allclose(found.std, in_range.std(0), rtol=1e-10)
    assert (found.scale, found.dtype) == (scale, "uint16")


@pytest.mark.parametrize("scale", ["dtype", "percentile", "none"])
def test_each_file_of_one_type_is_read_once(arrays, monkeypatch, scale):
    path, _ = arrays
    read: list[int] = []
    patiently = measuring.read_patiently
    monkeypatch.setattr(measuring, "read_patiently", lambda source, i: [read.append(i), patiently(source, i)][1])
    measured(path, scale)
    assert sorted(read) == list(range(24))


def test_workers_seeds_and_ranks_measure_the_same_to_the_bit(arrays):
    path, _ = arrays
    one = measured(path)
    assert one == measured(path, workers=5)
    assert one == measured(path, seed=7, rank=1, world_size=2)


def test_a_sample_is_enough_and_always_the_same_one(arrays, monkeypatch):
    path, pixels = arrays
    monkeypatch.setattr(measuring, "SAMPLE", 10)
    found = measured(path, "none")
    assert found == measured(path, "none")
    np.testing.assert_allclose(found.mean, pixels.mean(0), rtol=0.1)
    assert not np.allclose(found.mean, pixels.mean(0), rtol=1e-6)


def test_numbers_of_two_types_are_measured_as_they_will_be_scaled(tmp_path):
    small, large = bands(1, 20, 30, 2, "uint8"), bands(2, 20, 30, 2, "uint16")
    (tmp_path / "a.npy").write_bytes(npy_of(small))
    (tmp_path / "b.npy").write_bytes(npy_of(large))
    found = measured(tmp_path, in_chans=2)
    both = np.concatenate([(small / 255).reshape(-1, 2), (large / 65535).reshape(-1, 2)])
    assert found.dtype == "uint16"
    np.testing.assert_allclose(found.mean, both.mean(0), rtol=1e-10)
    np.testing.assert_allclose(found.std, both.std(0), rtol=1e-10)


def test_what_is_measured_is_said_and_unreadable_images_with_it(arrays, caplog):
    path, _ = arrays
    (path / "05.npy").write_bytes(b"broken")
    with caplog.at_level(logging.INFO, "spark_fast.pipelines"):
        measured(path)
    (line,) = [message for message in caplog.messages if message.startswith("measured")]
    assert line.startswith(
        "measured on 24 images, 1 of them unreadable, with --scale dtype, a number a channel: mean 0."
    )


def test_a_channel_that_never_changes_is_told(tmp_path, caplog):
    pixels = bands(1, 20, 30, 3)
    pixels[:, :, 1] = 7
    (tmp_path / "a.npy").write_bytes(npy_of(pixels))
    measured(tmp_path)
    assert "channels 1 are the same number everywhere in these images" in caplog.messages


def test_where_no_image_can_be_read_the_reason_of_one_is_given(tmp_path):
    (tmp_path / "a.npy").write_bytes(npy_of(bands(1, 20, 30, 4)))
    message = "none of the 1 images that were looked at can be read; a.npy: it has 4 channels where --in_chans is 3"
    with pytest.raises(DataError, match=message):
        measured(tmp_path)


def test_given_mean_and_deviation_take_the_place_of_the_measured(arrays):
    path, _ = arrays
    found = measured(path, mean=(1.0, 2.0, 3.0))
    assert found.mean == (1.0, 2.0, 3.0)
    assert found.std == measured(path).std
    kept = measured(path, statistics=found, std=(4.0, 5.0, 6.0))
    assert (kept.mean, kept.std) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))


def test_photographs_are_not_measured(image_folder):
    assert measure_statistics(image_folder(), LoaderOptions(4)) is None
    pipeline = build_pipeline(image_folder(), LoaderOptions(4))
    assert pipeline.statistics is None
    pipeline.close()


def test_three_channels_with_a_scale_are_measured_as_any_others(image_folder):
    found = measured(image_folder(), "none")
    assert found.dtype == "uint8"
    assert 50 < min(found.mean) < max(found.mean) < 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (1.0,)}, "mean needs --scale or --in_chans: photographs are normalised by ImageNet's|mean needs one"),
        ({"mean": (1.0, 2.0, 3.0)}, "mean needs --scale or --in_chans"),
        ({"in_chans": 2, "std": (1.0,)}, "std needs one number per channel, 2 in all; got 1"),
        ({"in_chans": 1, "std": (0.0,)}, r"std must be positive, got 0\.0"),
        ({"scaling": "log"}, "scale 'log' is unknown; choose one of auto, dtype, percentile, none"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        LoaderOptions(4, **options)


def test_statistics_of_other_channels_are_refused(arrays):
    path, _ = arrays
    with pytest.raises(SettingsError, match="statistics of 3 channels do not fit in_chans 4"):
        build_pipeline(path, LoaderOptions(4, in_chans=4, statistics=measured(path)))
