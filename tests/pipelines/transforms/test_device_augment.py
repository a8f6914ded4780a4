from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spark_fast.pipelines.transforms.crops import Box
from spark_fast.pipelines.transforms.device_augment import DeviceAugment, bicubic_weights
from tests.pipelines.comparing import alike, batches, pixels, same
from tests.pipelines.pictures import picture

CPU = torch.device("cpu")


def augmented(images, boxes, flips, size):
    """As the pipeline does it, with garbage where no crop lies; (B, H, W, 3) in 0 ... 255."""
    augment = DeviceAugment(size, CPU, torch.float32)
    cells = torch.randint(0, 256, (len(images), *augment.cell, 3), dtype=torch.uint8)
    crops = [augment.put(*each) for each in zip(images, boxes, flips, cells, strict=True)]
    return pixels(augment(cells, torch.tensor(crops)))


def with_pillow(image, box, flip, size):
    top, left, height, width = box
    crop = Image.fromarray(image).crop((left, top, left + width, top + height))
    resized = np.asarray(crop.resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
    return resized[:, ::-1] if flip else resized


def noisy(height, width):
    noise = np.random.default_rng(0).integers(-40, 40, (height, width, 3))
    return (picture(3, height, width).astype(int) + noise).clip(0, 255).astype(np.uint8)


@settings(max_examples=30)
@given(st.integers(1, 130), st.integers(1, 40))
def test_weights_are_pillows(length, out):
    # an impulse at a time, in floating point, shows Pillow's matrix
    ours = bicubic_weights(torch.tensor([length]), 130, out)[0]
    for at in {0, length // 2, length - 1}:
        line = np.zeros((1, length), np.float32)
        line[0, at] = 1
        theirs = np.asarray(Image.fromarray(line).resize((out, 1), Image.Resampling.BICUBIC))[0]
        np.testing.assert_allclose(ours[:, at].numpy(), theirs, atol=1e-5)
    assert not ours[:, length:].any()


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_a_batch_of_different_crops_agrees_with_pillow(size):
    image = noisy(200, 260)
    boxes = [Box(3, 5, 90, 120), Box(0, 0, 30, 40), Box(60, 80, 96, 128), Box(0, 0, 200, 260), Box(7, 9, 1, 60)]
    flips = [False, True, True, True, False]  # the fourth is larger than a cell
    got = augmented([image] * 5, boxes, flips, size)
    for ours, box, flip in zip(got, boxes, flips, strict=True):
        difference = np.abs(ours - with_pillow(image, box, flip, size))
        assert difference.mean() < 0.5  # of 255; Pillow rounds to bytes twice
        assert difference.max() < 8  # and clips between its two passes


def test_batches_are_those_of_the_host(image_folder):
    root = image_folder()
    for size in (32, 96):  # crops larger than a cell, and smaller
        assert alike(batches(root, input_size=size, augment_on="device"), batches(root, input_size=size))
    alone = batches(root, augment_on="device", workers=4, worker_processes=0, prefetch=5)
    assert same(alone, batches(root, augment_on="device", workers=1, prefetch=1))
    assert same(alone[2:], batches(root, augment_on="device", start_step=2))
