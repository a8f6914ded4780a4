"""Mean, deviation and percentiles are NumPy's, in however many parts they are measured."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_fast.errors import DataError
from spark_fast.pipelines.transforms.bands import statistics
from spark_fast.pipelines.transforms.bands.statistics import HIGH, LOW, Counts, Measured, Moments, Statistics, total
from tests.pipelines.bands import bands

TYPES = ["uint8", "int8", "uint16", "int16", "float16", "int32", "uint32", "float32", "float64"]
COARSE = {"int32", "uint32", "float32", "float64"}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 60), max_size=6), dtype=st.sampled_from(TYPES),
    offset=st.sampled_from([0, 1e4]),
)  # fmt: skip
def test_parts_in_any_cut_give_what_numpy_says_of_the_whole(seed, cuts, dtype, offset):
    pixels = bands(seed, 60, 20, 3, dtype)
    if dtype in ("float32", "float64"):
        pixels = pixels + np.asarray(offset, dtype)
    edges = sorted({0, 60, *cuts})
    whole = total(Measured.of(pixels[a:b]) for a, b in pairwise(edges))
    assert whole is not None
    flat = pixels.reshape(-1, 3).astype(np.float64)
    assert whole.moments.count == len(flat)
    np.testing.assert_allclose(whole.moments.mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.moments.std, flat.std(0), rtol=1e-8)
    for share in (LOW, 0.5, HIGH):
        expected = np.percentile(flat, 100 * share, axis=0)
        np.testing.assert_allclose(whole.percentile(share), expected, rtol=2**-15 if dtype in COARSE else 1e-12)


def test_a_large_image_is_measured_in_blocks(monkeypatch):
    pixels = bands(1, 30, 40, 4)
    at_once = Moments.of(pixels)
    monkeypatch.setattr(statistics, "_BLOCK", 7)
    in_blocks = Moments.of(pixels)
    np.testing.assert_allclose(in_blocks.mean, at_once.mean, rtol=1e-13)
    np.testing.assert_allclose(in_blocks.std, at_once.std, rtol=1e-12)


def test_negative_numbers_and_zeros_are_in_order():
    numbers = np.array([0.0, -0.0, -2.5, 3.0, -1e-30, 1e30, -1e30], np.float32)
    counts = Counts.of(numbers)
    assert counts.counts.tolist() == [1, 1, 1, 2, 1, 1]  # both zeros are one number
    assert counts.percentile(0.5) == 0
    np.testing.assert_allclose([counts.percentile(0), counts.percentile(1)], [-1e30, 1e30], rtol=2**-15)


def test_the_sum_of_nothing_is_none_and_of_few_their_sum_in_order():
    assert total(iter(())) is None
    for count in range(1, 20):
        assert total(chr(97 + i) for i in range(count)) == "abcdefghijklmnopqrst"[:count]


KEPT = Statistics("percentile", "uint16", (0.5, 0.25), (0.1, 0.2), (3.0, 4.0), (60000.0, 7.5))


def test_statistics_become_plain_types_and_back():
    assert Statistics.from_dict(KEPT.to_dict()) == KEPT
    assert all(type(v) in (str, list) for v in KEPT.to_dict().values())


@pytest.mark.parametrize("found", [None, {}, {**KEPT.to_dict(), "mean": "x"}, {**KEPT.to_dict(), "dtype": "os.system"}])
def test_what_are_no_statistics_is_refused(found):
    with pytest.raises(DataError, match="no statistics of images"):
        Statistics.from_dict(found)
