from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms.functional import normalize, to_tensor

from spark_fast.pipelines.transforms import resize as augment
from spark_fast.pipelines.transforms.crops import Box
from spark_fast.pipelines.transforms.resize import MEAN, STD, Normalise, cut
from tests.pipelines.pictures import picture


def cut_to(image: np.ndarray, box: Box, flip: bool, size: tuple[int, int]) -> np.ndarray:
    out = torch.empty(*size, 3, dtype=torch.uint8)
    cut(image, box, flip, out)
    return out.numpy()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(224, 224), (96, 160), (32, 32)])
@pytest.mark.parametrize("box", [Box(20, 30, 300, 400), Box(0, 0, 90, 100), Box(7, 9, 1, 60)])
def test_cut_agrees_with_pils_crop_and_bicubic_resize(box, size, flip):
    noisy = picture(3, 375, 500).astype(int) + np.random.default_rng(0).integers(-40, 40, (375, 500, 3))
    image = noisy.clip(0, 255).astype(np.uint8)
    top, left, height, width = box
    crop = Image.fromarray(image).crop((left, top, left + width, top + height))
    expected = np.asarray(crop.resize(size[::-1], Image.Resampling.BICUBIC))
    difference = cut_to(image, box, flip, size).astype(int) - (expected[:, ::-1] if flip else expected)
    assert np.abs(difference).mean() < 0.1  # of 255
    assert np.abs(difference).max() <= 2


def test_torch_is_given_pixels_side_by_side(monkeypatch):
    """Taken for planes, as an image with a batch stride of 0 is, they become the same image in twice the time."""
    seen = []
    monkeypatch.setattr(augment, "interpolate", lambda pixels, **how: seen.append(pixels) or interpolate(pixels, **how))
    cut_to(picture(1, 60, 80), Box(0, 0, 60, 80), False, (32, 32))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert interpolate(seen[0], size=(32, 32)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (50, 2500)])
def test_the_oddest_images_can_be_cut(shape):
    image = np.full((*shape, 3), 77, dtype=np.uint8)
    assert (cut_to(image, Box(0, 0, *shape), True, (64, 96)) == 77).all()


def test_only_the_place_in_the_batch_is_written():
    batch = torch.zeros(3, 8, 8, 3, dtype=torch.uint8)
    cut(picture(1), Box(0, 0, 60, 80), False, batch[1])
    assert batch[1].any()
    assert not batch[0].any()
    assert not batch[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_normalise_agrees_with_torchvision(dtype):
    pixels = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
    images = Normalise(48, torch.device("cpu"), dtype)(pixels)
    expected = torch.stack([normalize(to_tensor(p.numpy()), MEAN, STD) for p in pixels])
    assert images.shape == (2, 3, 32, 48)
    assert images.dtype == dtype
    assert images.is_contiguous(memory_format=torch.channels_last)
    rounding = {torch.bfloat16: 0.01, torch.float16: 0.002}.get(dtype, 1e-6)
    torch.testing.assert_close(images.float(), expected, atol=rounding, rtol=0)


def test_normalise_takes_a_mean_and_a_deviation_for_each_of_any_number_of_channels():
    pixels = torch.randint(0, 256, (2, 8, 6, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3, 0.4), (0.5, 0.25, 0.125, 1.0)
    images = Normalise(6, torch.device("cpu"), torch.float32, mean, std)(pixels)
    expected = torch.stack([normalize(to_tensor(p.numpy()), mean, std) for p in pixels])
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)
