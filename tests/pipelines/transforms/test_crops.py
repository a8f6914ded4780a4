from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from spark_fast.pipelines.convert.reencode import Reencode
from spark_fast.pipelines.sampler import uniform
from spark_fast.pipelines.transforms.crops import DRAWS, Augmentation, Box, centre_box, random_box
from tests.pipelines.drawing import drawn

sides = st.integers(1, 3000)
SCALE, RATIO = (0.67, 1.0), (3 / 4, 4 / 3)


@given(sides, sides, st.integers(0, 10**6))
def test_a_crop_lies_inside_its_image(height, width, sample):
    box, _ = drawn(Augmentation(), 0, 0, sample, height, width)
    assert box.height >= 1
    assert box.width >= 1
    assert 0 <= box.top <= height - box.height
    assert 0 <= box.left <= width - box.width


@given(sides, sides, st.integers(0, 10**6))
def test_a_crop_has_the_area_and_aspect_asked_for_unless_the_image_has_not(height, width, sample):
    draws = uniform(7, 0, [sample], DRAWS)[0].tolist()
    box = random_box(draws, height, width, SCALE, RATIO)
    fallback = random_box([0.5] * DRAWS, 1, 10**6, SCALE, RATIO)  # no attempt can succeed
    assert fallback == Box(0, 499999, 1, 1)
    if min(height, width) > 100 and 0.9 < width / height < 1.1:
        assert 0.65 < box.height * box.width / (height * width) <= 1
        assert 0.73 < box.width / box.height < 1.37


@pytest.mark.parametrize(("height", "width"), [(50, 2500), (2500, 50), (1, 4000), (1, 1)])
def test_extreme_images_get_torchvisions_central_fallback(height, width):
    # one torchvision call suffices: where all ten attempts fail, its result is not random
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(3, height, width), list(SCALE), list(RATIO))
    box, _ = drawn(Augmentation(), 0, 0, 5, height, width)
    assert box == (top, left, h, w)


def test_crops_are_distributed_as_torchvisions():
    height, width, n = 375, 500, 4000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(n)])
    pairs = [drawn(Augmentation(), 1, 0, sample, height, width) for sample in range(n)]
    ours = np.array([box for box, _ in pairs])
    deciles = np.linspace(0.1, 0.9, 9)
    for column, size in enumerate((height, width, height, width)):
        difference = np.quantile(ours[:, column], deciles) - np.quantile(theirs[:, column], deciles)
        assert np.abs(difference).max() / size < 0.015
    assert np.mean([flip for _, flip in pairs]) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(n))


def test_the_same_numbers_give_torchvisions_very_box():
    # replay torchvision's formula on the same uniform numbers, written out independently
    draws = uniform(3, 1, np.arange(300), DRAWS)
    for row in draws:
        area = 400 * 600 * (0.67 + 0.33 * row[0])
        aspect = math.exp(math.log(0.75) + (math.log(4 / 3) - math.log(0.75)) * row[1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= 600 and h <= 400:
            expected = (math.floor(row[20] * (401 - h)), math.floor(row[21] * (601 - w)), h, w)
            assert random_box(row.tolist(), 400, 600, SCALE, RATIO) == expected


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (480, 640), (1200, 1600), (400, 600)])
def test_a_folder_and_its_shards_draw_the_same_crop_but_for_the_share_that_docs_data_md_tells(height, width):
    stored_height, stored_width = Reencode(short_side=256).size(height, width)
    other, scale = 0, height / stored_height
    for draws in uniform(5, 0, np.arange(4000), DRAWS).tolist():
        large = random_box(draws, height, width, SCALE, RATIO)
        small = random_box(draws, stored_height, stored_width, SCALE, RATIO)
        # The same attempt, unless one that just fits the one size does not fit the other.
        if max(abs(a - b * scale) for a, b in zip(large, small, strict=True)) > 2 * scale + 1:
            other += 1
    assert other / 4000 < 0.03
    assert random_box(draws, height, width, SCALE, RATIO) == large  # sizes that are kept: the very same


@given(st.lists(st.tuples(st.integers(0, 10**9), sides, sides), min_size=1, max_size=10), st.integers(0, 99))
def test_a_sample_is_cropped_alike_in_any_company(samples, epoch):
    augmentation = Augmentation()
    together = uniform(4, epoch, [i for i, _, _ in samples], DRAWS).tolist()
    for draws, (i, height, width) in zip(together, samples, strict=True):
        alone = drawn(augmentation, 4, epoch, i, height, width)
        assert (augmentation.box(draws, height, width), augmentation.flips(draws)) == alone


@given(sides, sides, st.integers(32, 512), st.integers(32, 512))
def test_a_centre_crop_is_central_largest_and_of_the_inputs_aspect(height, width, h, w):
    box = centre_box(height, width, (h, w))
    assert box.height == height or box.width == width
    assert abs(2 * box.top + box.height - height) <= 1
    assert abs(2 * box.left + box.width - width) <= 1
    scale = min(height / h, width / w)
    assert abs(box.height - h * scale) <= max(0.5, 1 - h * scale)
    assert abs(box.width - w * scale) <= max(0.5, 1 - w * scale)


def test_without_augmentation_nothing_is_drawn():
    augmentation = Augmentation((32, 64), random=False)
    first, second = (drawn(augmentation, 0, 0, sample, 100, 100) for sample in (1, 2))
    assert first == second == (Box(25, 0, 50, 100), False)
    assert not any(flip for _, flip in (drawn(Augmentation(flip=False), 0, 0, i, 9, 9) for i in range(50)))


def test_a_smaller_central_crop_is_that_of_resizing_the_shorter_side_and_cropping():
    # torchvision: Resize(256), CenterCrop(224) of 512 x 640 is 448 x 448 of the original's pixels
    assert centre_box(512, 640, (224, 224), 224 / 256) == Box(32, 96, 448, 448)
    assert Augmentation(random=False, centre=0.5).box([0.0] * DRAWS, 100, 200) == Box(25, 75, 50, 50)
