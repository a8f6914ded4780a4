from __future__ import annotations

import gc
import logging
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spark_fast.pipelines import Pipeline
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.transforms.crops import Augmentation
from spark_fast.pipelines.transforms.resize import MEAN, STD
from tests.pipelines.building import build
from tests.pipelines.comparing import batches
from tests.pipelines.drawing import drawn


def decoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_an_image_is_what_the_published_transforms_would_make_of_it(image_folder):
    root = image_folder()
    source = detect_source(root)
    (images, _, ids), *_ = batches(root, epoch=3, input_size=(48, 32))
    for image, i in zip(images, ids.tolist(), strict=True):
        pil = Image.open(source.root / source.name(i))
        box, flip = drawn(Augmentation((48, 32)), 5, 3, i, pil.height, pil.width)
        top, left, height, width = box
        pil = pil.crop((left, top, left + width, top + height)).resize((32, 48), Image.Resampling.BICUBIC)
        pixels = np.asarray(pil)[:, ::-1] if flip else np.asarray(pil)
        back = 255 * (image.permute(1, 2, 0).numpy() * STD + MEAN)
        assert np.abs(back - pixels).mean() < 0.2


def test_epochs_and_seeds_differ_in_order_and_crops(image_folder):
    root = image_folder()
    first = batches(root, batch_size=24)[0]
    for other in (batches(root, batch_size=24, epoch=1)[0], batches(root, batch_size=24, seed=6)[0]):
        assert first.ids.tolist() != other.ids.tolist()
        again = torch.argsort(other.ids)[torch.argsort(torch.argsort(first.ids))]
        assert not torch.equal(first.images, other.images[again])


def test_without_augmentation_every_epoch_has_the_same_images(image_folder):
    root = image_folder()
    first, second = (batches(root, batch_size=24, epoch=e, augment=False)[0] for e in (0, 1))
    assert torch.equal(first.images[first.ids.argsort()], second.images[second.ids.argsort()])


def test_threads_are_gone_after_close_and_torch_keeps_its_own(image_folder):
    before = torch.get_num_threads()
    pipeline = build(image_folder(), batch_size=6, input_size=32, workers=3, worker_processes=0)
    assert len(decoders()) == 3
    assert torch.get_num_threads() == before
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [before]
    next(iter(pipeline.epoch(0)))
    pipeline.close()
    pipeline.close()
    assert not decoders()
    with pytest.raises(RuntimeError, match="was closed"):
        pipeline.epoch(0)


@pytest.mark.parametrize(
    ("asked", "said"),
    [(0, "3 threads decode, in this process: as asked"), (2, "3 threads decode, in 2 worker processes")],
)
def test_the_log_says_who_decodes(image_folder, caplog, asked, said):
    with caplog.at_level(logging.INFO, "spark_fast.pipelines"):
        build(image_folder(), batch_size=6, input_size=32, workers=3, worker_processes=asked).close()
    assert any(message.startswith(said) for message in caplog.messages)


def test_decoder_threads_use_one_core_each(image_folder):
    pipeline = build(image_folder(), batch_size=6, input_size=32, workers=2)
    assert pipeline._filler.pool.submit(torch.get_num_threads).result() == 1
    pipeline.close()


def test_leaving_an_epoch_early_cancels_what_is_in_the_making(image_folder):
    pipeline, loaded = build(image_folder(), batch_size=6, input_size=32, prefetch=4), []
    read = pipeline._source.read
    pipeline._source.read = lambda i: (loaded.append(i), read(i))[1]
    for epoch in range(20):
        iterator = pipeline.epoch(epoch)
        next(iterator)
        iterator.close()
    assert len(list(pipeline.epoch(0))) == 4
    assert len(loaded) < 21 * 24, "some were never begun"
    assert len(pipeline._memory.buffers._idle) <= 6
    pipeline.close()


def test_closing_while_an_epoch_is_open_ends_it(image_folder):
    pipeline = build(image_folder(), batch_size=2, input_size=32, prefetch=1)
    iterator = pipeline.epoch(0)
    next(iterator)
    pipeline.close()
    with pytest.raises(RuntimeError, match=r"closed|shutdown"):
        list(iterator)
    assert not decoders()


def test_many_pipelines_leave_no_memory_and_no_threads(image_folder):
    root = image_folder()

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    found = [resident()]
    for _ in range(4):
        for _ in range(10):
            batches(root, input_size=128)
        found.append(resident())
    assert not decoders()
    grown = [after - before for before, after in pairwise(found)]
    assert (
        min(grown) < 10e6
    )  # malloc may keep more once; a batch kept by each, in bytes and fp32, were 15 MB every time


def test_real_images_make_real_batches(imagenet_sample):
    pipeline: Pipeline = build(imagenet_sample, batch_size=16, input_size=224)
    images, labels, _ = next(iter(pipeline.epoch(0)))
    assert images.shape == (16, 3, 224, 224)
    assert abs(images.mean()) < 0.5
    assert 0.7 < images.std() < 1.5
    assert labels is not None
    pipeline.close()


def test_start_steps_outside_the_epoch_are_refused(image_folder):
    pipeline = build(image_folder(), batch_size=6, input_size=32)
    with pytest.raises(ValueError, match="start_step 5 lies outside an epoch of 4 steps"):
        pipeline.epoch(0, 5)
    assert list(pipeline.epoch(0, 4)) == []
    pipeline.close()


def test_for_a_device_that_is_neither_cpu_nor_cuda_the_host_normalises(image_folder):
    pipeline = build(image_folder(), batch_size=6, input_size=32, device="meta")
    assert pipeline._normalise._factor.device.type == "cpu"  # meta tensors would hide a mixture of devices
    first = next(pipeline.epoch(0))
    pipeline.close()
    assert first.images.device.type == "meta"
    assert first.images.shape == (6, 3, 32, 32)
    assert first.images.is_contiguous(memory_format=torch.channels_last)
