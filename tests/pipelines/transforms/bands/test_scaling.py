"""`--scale` and normalisation, against the same arithmetic in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.bands.scaling import BandNormalise, as_batch, batch_dtype, largest, scaled
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from tests.pipelines.bands import bands

CPU = torch.device("cpu")
MEAN, STD = (0.4, 0.5, 0.6, 0.7), (0.1, 0.2, 0.05, 0.3)


def statistics(scale: str, dtype: str) -> Statistics:
    unit = largest(dtype)
    low, high = (tuple((share + 0.01 * np.arange(4)) * unit) for share in (0.3, 0.8))
    return Statistics(scale, dtype, MEAN, STD, low, high)


@pytest.mark.parametrize("scale", ["dtype", "percentile", "none"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_pixels_are_scaled_and_normalised(scale, dtype):
    images = np.stack([bands(seed, 9, 11, 4, dtype) for seed in range(3)])
    known = statistics(scale, dtype)
    x = images.astype(np.float64)
    if scale == "dtype":
        x = x / {"uint8": 255, "uint16": 65535, "int16": 32767, "float32": 1}[dtype]
    elif scale == "percentile":
        low, high = np.array(known.low), np.array(known.high)
        x = ((x - low) / (high - low)).clip(0, 1)
        assert 0.05 < ((x == 0) | (x == 1)).mean() < 0.95
    np.testing.assert_allclose(scaled(images[0], known), x[0], rtol=1e-12, atol=1e-12)
    expected = ((x - MEAN) / STD).transpose(0, 3, 1, 2)
    normalise = BandNormalise(known, 11, CPU, torch.float32)
    found = normalise(torch.from_numpy(images))
    assert found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6 / min(STD))
    one = torch.empty(9, 11, 4)
    normalise.into(one, torch.from_numpy(images[1]))
    assert torch.equal(one.permute(2, 0, 1), found[1])
    assert BandNormalise(known, 11, CPU, torch.bfloat16)(torch.from_numpy(images)).dtype == torch.bfloat16


def test_a_resize_that_overshoots_is_cut_off_where_the_numbers_of_the_files_end():
    normalise = BandNormalise(
        replace(statistics("dtype", "uint16"), mean=(0.0,) * 4, std=(1.0,) * 4), 1, CPU, torch.float32
    )
    pixels = torch.tensor([-5000.0, 0.0, 65535.0, 70000.0]).view(1, 1, 1, 4)
    assert normalise(pixels).flatten().tolist() == pytest.approx([0, 0, 1, 1])


def test_a_channel_that_is_one_number_everywhere_is_only_shifted():
    known = Statistics("none", "float32", (2.0, 1.0), (0.0, 4.0), (2.0, 0.0), (2.0, 9.0))
    pixels = torch.tensor([2.0, 9.0]).view(1, 1, 1, 2)
    assert BandNormalise(known, 1, CPU, torch.float32)(pixels).flatten().tolist() == [0.0, 2.0]
    stretched = replace(known, scale="percentile")
    assert BandNormalise(stretched, 1, CPU, torch.float32)(pixels).isfinite().all()


@pytest.mark.parametrize(
    ("found", "batch"),
    [
        (["uint8"], "uint8"), (["uint16"], "uint16"), (["int16"], "int16"), (["uint8", "uint16"], "uint16"),
        (["float16"], "float32"), (["uint8", "int16"], "float32"), (["uint32"], "float32"), (["int8"], "float32"),
    ],
)  # fmt: skip
def test_a_batch_has_the_smallest_numbers_that_hold_all(found, batch):
    assert batch_dtype(map(np.dtype, found)) == batch


def test_numbers_of_a_smaller_type_become_those_of_the_batch():
    small = bands(1, 5, 6, 4, "uint8")
    to_uint16 = as_batch(small, statistics("dtype", "uint16"))
    assert to_uint16.dtype == np.uint16
    np.testing.assert_allclose(to_uint16 / 65535, small / 255, rtol=1e-12)
    assert np.array_equal(as_batch(small, statistics("none", "uint16")), small)
    np.testing.assert_allclose(as_batch(small, statistics("dtype", "float32")), small / 255, rtol=1e-6)
    assert np.array_equal(as_batch(small, statistics("none", "float32")), small)
    assert as_batch(small, statistics("none", "uint8")) is small


def test_numbers_that_the_batch_cannot_hold_are_refused():
    with pytest.raises(ImageError, match="its numbers are uint16, those of the images measured at the start uint8"):
        as_batch(bands(1), statistics("dtype", "uint8"))
