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
from spark_fast.pipelines import Batch
from spark_fast.pipelines.backends.batch_decoder import Encoded
from spark_fast.pipelines.backends.dali import DaliDecoder, as_ppm
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.transforms.crops import Augmentation, Box
from tests.pipelines.building import build
from tests.pipelines.comparing import alike, left_open, pixels, same, ways_to_end
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_are_as_the_contract_says(image_folder, dtype):
    root = image_folder(26)
    labels = detect_source(root).labels
    got = batches(root, batch_size=6, input_size=(32, 48), dtype=dtype)
    assert len(got) == 4  # of 6; the last 2 images are dropped
    for images, targets, ids in got:
        assert images.shape == (6, 3, 32, 48)
        assert images.dtype == dtype
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert ids.dtype == targets.dtype == torch.int64
        assert targets.tolist() == labels[ids.numpy()].tolist()
    assert len({i for batch in got for i in batch.ids.tolist()}) == 24


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
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_sees_what_torch_sees_on_one(image_folder, world):
    root = image_folder()
    ranks = [batches(root, epoch=1, rank=rank, world_size=world) for rank in range(world)]
    together = [
        Batch(*(torch.cat(parts) for parts in zip(*shares, strict=True))) for shares in zip(*ranks, strict=True)
    ]
    assert alike(together, batches(root, epoch=1, pipeline="torch"))
    assert same(together, batches(root, epoch=1))


@pytest.mark.dali
@pytest.mark.parametrize("start", range(5))
def test_starting_at_a_step_gives_the_tail_of_the_epoch(image_folder, start):
    root = image_folder()
    tail = batches(root, epoch=2, start_step=start, batch_size=6)
    assert same(tail, batches(root, epoch=2, batch_size=6)[start:])
    if tail:
        assert alike(tail, batches(root, epoch=2, start_step=start, batch_size=6, pipeline="torch"))


@pytest.mark.dali
@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (4, 5)])
def test_workers_and_prefetch_change_nothing(image_folder, workers, prefetch):
    root = image_folder()
    assert same(batches(root, workers=workers, prefetch=prefetch, batch_size=4), batches(root, batch_size=4))


@pytest.mark.dali
def test_every_image_comes_once_an_epoch_and_epochs_differ(image_folder):
    pipeline = build(image_folder(), pipeline="dali", batch_size=6, input_size=32)
    orders = [[i for batch in pipeline.epoch(epoch) for i in batch.ids.tolist()] for epoch in range(4)]
    assert all(sorted(ids) == list(range(24)) for ids in orders)
    assert len({tuple(ids) for ids in orders}) == 4
    pipeline.close()


@pytest.mark.dali
def test_a_delivered_batch_is_never_written_again(image_folder):
    pipeline = build(image_folder(), pipeline="dali", batch_size=4, input_size=32, prefetch=1)
    kept = [(batch.images, batch.images.clone()) for epoch in range(3) for batch in pipeline.epoch(epoch)]
    pipeline.close()
    assert all(torch.equal(images, copy) for images, copy in kept)
    assert len({images.data_ptr() for images, _ in kept}) == 18


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


@pytest.mark.dali
def test_one_pipeline_serves_two_epochs_at_once(image_folder):
    root = image_folder()
    pipeline = build(root, pipeline="dali", batch_size=6, input_size=32, seed=5)
    pairs = list(zip(pipeline.epoch(0), pipeline.epoch(1), strict=True))
    assert same([a for a, _ in pairs], batches(root, epoch=0, batch_size=6))
    assert same([b for _, b in pairs], batches(root, epoch=1, batch_size=6))
    pipeline.close()


@pytest.mark.dali
def test_leaving_epochs_early_disturbs_none_of_the_following(image_folder):
    root = image_folder()
    pipeline = build(root, pipeline="dali", batch_size=4, input_size=32, seed=5, prefetch=4)
    for epoch in range(10):
        iterator = pipeline.epoch(epoch)
        next(iterator)
        iterator.close()
    assert same(list(pipeline.epoch(0)), batches(root, batch_size=4))
    assert pipeline.bad_images.read == 10 * 4 + 24  # counted when delivered
    pipeline.close()


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
@ways_to_end
def test_the_program_ends_with_an_epoch_left_open(image_folder, then, code):
    ended = left_open(image_folder(), "dali", 12, then)
    assert (ended.returncode, ended.stdout) == (code, "running\n"), ended.stderr


@pytest.mark.dali
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_cuda_the_batches_are_those_of_the_cpu(imagenet_sample):
    settings = {"batch_size": 16, "input_size": 224, "device": "cuda", "dtype": torch.bfloat16}
    ours = [batch._replace(images=batch.images.cpu(), labels=batch.labels.cpu())
            for batch in batches(imagenet_sample, **settings)]  # fmt: skip
    theirs = batches(imagenet_sample, batch_size=16, input_size=224, pipeline="torch")
    assert alike(ours, theirs, 1.5)
