from __future__ import annotations

import numpy as np
import pytest

from spark_fast.pipelines.backends.measure import measure
from spark_fast.pipelines.convert.stored_statistics import Tally, statistics_by_scale
from spark_fast.pipelines.sources.folder import folder_source
from spark_fast.pipelines.transforms.bands.expected import Expected
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from tests.pipelines.bands import bands, npy_of


def reports(images: list[np.ndarray], shards: int = 3) -> list[dict]:
    tallies = [Tally() for _ in range(shards)]
    for i, image in enumerate(images):
        tallies[i % shards].add(image)
    return [tally.report() for tally in tallies]


def values(images: list[np.ndarray]) -> np.ndarray:
    """(pixels, channels), float64."""
    return np.concatenate([image.reshape(-1, image.shape[2]) for image in images]).astype(np.float64)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float16", "float32", "float64"])
def test_the_statistics_are_numpys_of_all_images_together(dtype):
    images = [bands(i, 30 + i, 40, 4, dtype) for i in range(23)]  # of several sizes: a mean of means would differ
    found = {scale: Statistics.from_dict(s) for scale, s in statistics_by_scale(reports(images)).items()}
    numbers = values(images)
    low, high = np.percentile(numbers, [0.1, 99.9], axis=0)
    unit = np.iinfo(dtype).max if np.dtype(dtype).kind in "ui" else 1
    expected = {
        "dtype": numbers / unit,
        "none": numbers,
        "percentile": (numbers.clip(low, high) - low) / (high - low),
    }
    coarse = dtype in ("int32", "float32", "float64")  # counted by their 16 leading digits
    assert set(found) == set(expected)
    for scale, scaled in expected.items():
        tolerance = 1e-4 if coarse and scale == "percentile" else 1e-9
        assert np.allclose(found[scale].mean, scaled.mean(0), rtol=tolerance, atol=0)
        assert np.allclose(found[scale].std, scaled.std(0), rtol=tolerance, atol=0)
        assert np.allclose(found[scale].low, low, rtol=2e-5 if coarse else 1e-9, atol=0)
        assert np.allclose(found[scale].high, high, rtol=2e-5 if coarse else 1e-9, atol=0)
        assert found[scale].scale == scale
        assert found[scale].dtype == (dtype if dtype in ("uint8", "uint16", "int16") else "float32")


@pytest.mark.parametrize("dtypes", [["uint16"], ["uint8", "uint16"], ["float32"], ["int16", "float32"]])
@pytest.mark.parametrize("scale", ["dtype", "percentile", "none"])
def test_they_are_those_that_the_trainer_measures_on_the_same_images(tmp_path, dtypes, scale):
    images = [bands(i, 30, 40, 3, dtypes[i % len(dtypes)]) for i in range(10)]
    for i, image in enumerate(images):
        (tmp_path / f"{i}.npy").write_bytes(npy_of(image))
    measured = measure(folder_source(tmp_path, endings=(".npy",)), Expected(3), scale)
    found = Statistics.from_dict(statistics_by_scale(reports(images))[scale])
    assert (found.scale, found.dtype, found.low, found.high) == (scale, measured.dtype, measured.low, measured.high)
    assert np.allclose(found.mean, measured.mean, rtol=1e-4)
    assert np.allclose(found.std, measured.std, rtol=1e-4)


def test_a_channel_that_is_the_same_number_everywhere_has_no_deviation():
    flat = np.full((20, 20, 2), 700, np.uint16)
    flat[..., 1] = np.arange(400).reshape(20, 20)
    for scale, found in statistics_by_scale(reports([flat] * 4)).items():
        assert found["std"][0] == 0, scale
        assert found["std"][1] > 0


def test_the_same_images_give_the_same_figures_however_many_are_counted_at_a_time():
    images = [bands(i, 20, 20, 2, "float32") for i in range(70)]
    whole = statistics_by_scale(reports(images, 1))
    parts = statistics_by_scale(reports(images, 7))
    for scale in whole:
        for name in ("mean", "std"):
            assert np.allclose(whole[scale][name], parts[scale][name], rtol=1e-12)
        assert (whole[scale]["low"], whole[scale]["high"]) == (parts[scale]["low"], parts[scale]["high"])


def test_photographs_have_no_such_statistics():
    assert Tally().report() == {}
    assert statistics_by_scale([{}, {}]) == {}


def test_a_large_mean_does_not_swallow_a_small_deviation():
    rng = np.random.default_rng(0)
    images = [(60000 + rng.integers(-1, 2, (50, 50, 1))).astype(np.uint16) for _ in range(20)]
    found = statistics_by_scale(reports(images))["none"]
    assert found["std"][0] == pytest.approx(values(images).std(), rel=1e-12)
