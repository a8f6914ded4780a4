"""The DALI backend, held against the torch backend: same samples, boxes and flips, nearly the same pixels."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spark_fast.commands import INSTALL_DALI
from spark_fast.errors import SettingsError
from spark_fast.pipelines.backends.batch_decoder import Encoded
from spark_fast.pipelines.backends.dali import DaliDecoder, as_ppm
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.transforms.crops import Augmentation, Box
from tests.pipelines.building import build
from tests.pipelines.comparing import alike, pixels
from tests.pipelines.comparing import dali_batches as batches
from tests.pipelines.drawing import drawn
from tests.pipelines.pictures import picture


def test_without_dali_the_command_that_installs_it_is_given(image_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(SettingsError, match=r"needs NVIDIA DALI") as caught:
        build(image_folder(), pipeline="dali", batch_size=4)
    assert f"{INSTALL_DALI}\n" in str(caught.value)
    assert "pip install nvidia-dali-cuda130" in str(caught.value)


@pytest.mark.dali
def test_an_image_is_what_the_published_transforms_would_make_of_it(image_folder):
    root = image_folder()
    source = detect_source(root)
    (images, _, ids), *_ = batches(root, epoch=3, input_size=(48, 32))
    flips = []
    for image, i in zip(pixels(images), ids.tolist(), strict=True):
        pil = Image.open(source.root / source.name(i))
        box, flip = drawn(Augmentation((48, 32)), 5, 3, i, pil.height, pil.width)
        top, left, height, width = box
        pil = pil.crop((left, top, left + width, top + height)).resize((32, 48), Image.Resampling.BICUBIC)
        expected = np.asarray(pil)[:, ::-1] if flip else np.asarray(pil)
        assert np.abs(image - expected).mean() < 0.6
        flips.append(flip)
    assert len(set(flips)) == 2


@pytest.mark.dali
def test_real_images_are_within_the_tolerance_of_pillow(imagenet_sample):
    source = detect_source(imagenet_sample)
    (images, _, ids), *_ = batches(imagenet_sample, batch_size=24, input_size=224)
    differences = []
    for image, i in zip(pixels(images), ids.tolist(), strict=True):
        pil = Image.open(source.root / source.name(i)).convert("RGB")
        box, flip = drawn(Augmentation(), 5, 0, i, pil.height, pil.width)
        top, left, height, width = box
        pil = pil.crop((left, top, left + width, top + height)).resize((224, 224), Image.Resampling.BICUBIC)
        differences.append(np.abs(image - (np.asarray(pil)[:, ::-1] if flip else np.asarray(pil))).mean())
    assert np.mean(differences) < 0.3
    assert np.max(differences) < 1.5
    assert alike(batches(imagenet_sample, batch_size=16), batches(imagenet_sample, batch_size=16, pipeline="torch"))


@pytest.mark.dali
def test_the_decoder_hands_pixels_through_and_never_writes_them_again():
    decoder = DaliDecoder(2, (30, 40), torch.device("cpu"), 1)
    box = Box(20, 11, 30, 40)
    shown = [picture(i) for i in range(8)]
    kept = [
        decoder.decode(
            [
                Encoded(
                    as_ppm(image[box.top : box.top + box.height, box.left : box.left + box.width]),
                    Box(0, 0, 30, 40),
                    flip,
                )
                for flip in (False, True)
            ]
        )
        for image in shown
    ]
    decoder.close()
    for image, (plain, flipped) in zip(shown, kept, strict=True):
        assert np.array_equal(plain, image[20:50, 11:51])
        assert np.array_equal(flipped, image[20:50, 11:51][:, ::-1])


def native_threads() -> int:
    gc.collect()
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.dali
def test_close_lets_go_of_threads_and_memory(image_folder):
    root = image_folder()
    for _ in range(3):
        batches(root, input_size=128)
    threads, before = native_threads(), int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    for _ in range(20):
        batches(root, input_size=128)
    assert native_threads() <= threads
    assert int(Path("/proc/self/statm").read_text().split()[1]) * 4096 - before < 30e6
    pipeline = build(root, pipeline="dali", batch_size=4, input_size=32, prefetch=1)
    iterator = pipeline.epoch(0)
    next(iterator)
    pipeline.close()
    pipeline.close()
    with pytest.raises(RuntimeError, match=r"closed|shutdown"):
        list(iterator)
    with pytest.raises(RuntimeError, match="was closed"):
        pipeline.epoch(0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.mark.dali
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_cuda_the_batches_are_those_of_the_cpu(imagenet_sample):
    settings = {"batch_size": 16, "input_size": 224, "device": "cuda", "dtype": torch.bfloat16}
    ours = [batch._replace(images=batch.images.cpu(), labels=batch.labels.cpu())
            for batch in batches(imagenet_sample, **settings)]  # fmt: skip
    theirs = batches(imagenet_sample, batch_size=16, input_size=224, pipeline="torch")
    assert alike(ours, theirs, 1.5)
