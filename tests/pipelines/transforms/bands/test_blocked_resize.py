"""The resize of any numbers against torch's own in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from spark_fast.pipelines.transforms.bands import blocked_resize
from spark_fast.pipelines.transforms.bands.blocked_resize import copy_pixels, resized
from tests.pipelines.bands import bands

SIDES, COLUMNS = st.integers(1, 70), st.integers(2, 70)  # where one column is asked for, torch errs


def torchs(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float64))[None]
    return interpolate(planes, size=size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


@settings(max_examples=50)
@given(SIDES, SIDES, SIDES, COLUMNS, st.integers(1, 5), st.integers(0, 9))
def test_any_size_becomes_any_other_as_torch_resizes_it(height, width, rows, columns, channels, seed):
    pixels = np.random.default_rng(seed).normal(size=(height, width, channels))
    exact = torchs(pixels, (rows, columns))
    found = resized(pixels, (rows, columns))
    assert found.shape == (rows, columns, channels)
    np.testing.assert_allclose(found.numpy(), exact, atol=1e-12)
    np.testing.assert_allclose(resized(pixels[::-1, ::-1], (rows, columns)), exact[::-1, ::-1], atol=1e-12)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float16", "float32"])
def test_numbers_of_every_type_and_a_crop_in_memory_are_taken(dtype):
    pixels = bands(0, 400, 300, 12, dtype)[7:-9, 3:-5]
    exact, found = torchs(pixels, (64, 48)), resized(pixels, (64, 48))
    assert found.dtype == (torch.float64 if dtype == "uint32" else torch.float32), "what holds every such number"
    rounding = 1e-12 if dtype == "uint32" else 5e-7
    np.testing.assert_allclose(found.numpy(), exact, rtol=0, atol=rounding * np.abs(exact).max())


@pytest.mark.parametrize("size", [(40, 30), (700, 500)])
def test_a_large_image_is_copied_in_parts(monkeypatch, size):
    pixels = bands(3, 300, 200, 2)
    many = pixels.astype(np.float64)
    whole, whole_many = resized(pixels, size), resized(many, size)
    monkeypatch.setattr(blocked_resize, "_AT_ONCE", 20_000)
    # on some processors the width of a product decides in which order it is added
    torch.testing.assert_close(resized(pixels, size), whole, rtol=0, atol=5e-7 * float(whole.max()))
    torch.testing.assert_close(resized(many, size), whole_many, rtol=0, atol=1e-15 * float(whole_many.max()))


def test_a_single_column_is_resized_as_any():
    pixels = bands(0, 39, 50, 3, "float64")
    wide = np.repeat(pixels.mean(1, keepdims=True), 2, axis=1)
    np.testing.assert_allclose(resized(wide, (59, 1)).numpy()[:, 0], torchs(wide, (59, 2))[:, 0], atol=1e-12)


def test_a_precision_that_is_enough_for_a_network_does_not_take_bits_from_its_images():
    pixels, before = bands(0, 300, 300, 12), torch.get_float32_matmul_precision()
    exact = torchs(pixels, (224, 224))
    torch.set_float32_matmul_precision("medium")
    try:
        np.testing.assert_allclose(resized(pixels, (224, 224)).numpy(), exact, rtol=0, atol=1e-12 * exact.max())
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("side", [40, 224])
def test_threads_and_places_in_memory_change_no_bit(side):
    pixels = bands(0, 259, 131, 12)
    exact = resized(pixels, (side, side)).clone()
    torch.set_num_threads(3)
    assert torch.equal(resized(pixels, (side, side)), exact)
    torch.set_num_threads(1)
    moved = np.empty(pixels.size + 3, pixels.dtype)[3:].reshape(pixels.shape)
    moved[:] = pixels
    assert torch.equal(resized(moved, (side, side)), exact)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 12])
def test_pixels_are_copied_from_any_order_of_rows_and_columns(channels, dtype):
    pixels = bands(0, 9, 7, channels, dtype)
    for view in (pixels, pixels.transpose(1, 0, 2), pixels[::-1, ::-1], pixels[2:5, 1:6], pixels[:, :, ::-1]):
        for type_ in (dtype, "float32"):
            out = np.zeros((view.shape[0] + 2, *view.shape[1:]), type_)
            copy_pixels(out[1:-1], view)
            assert np.array_equal(out[1:-1], view)
            assert not out[[0, -1]].any()
