"""The FFCV backend, held against the torch backend: same samples, boxes and flips, nearly the same pixels."""

from __future__ import annotations

import io
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from spark_fast.errors import DataError, SettingsError
from spark_fast.pipelines import Batch
from spark_fast.pipelines.sources.beton import CHECKS, checks_path, sealed_checks
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.sources.shard_format import BETON
from spark_fast.pipelines.transforms.crops import Augmentation
from tests.pipelines.building import build
from tests.pipelines.comparing import alike, left_open, pixels, same, ways_to_end
from tests.pipelines.comparing import ffcv_batches as batches
from tests.pipelines.drawing import drawn

CLOSE = 2.0  # FFCV decodes JPEGs with a faster, rougher DCT; tenths for raw records


def reference(pil: Image.Image, box: tuple[int, int, int, int], mirrored: bool, size: tuple[int, int]) -> np.ndarray:
    """What the published transforms make of an image."""
    top, left, height, width = box
    pil = pil.crop((left, top, left + width, top + height)).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(pil)[:, ::-1] if mirrored else np.asarray(pil)


def test_without_ffcv_the_command_that_installs_it_is_given(tmp_path, monkeypatch):
    (tmp_path / BETON).write_bytes(bytes(100))
    with (tmp_path / BETON).open("rb") as file:
        checks_path(tmp_path / BETON).write_bytes(sealed_checks(np.zeros(8, CHECKS), file))
    monkeypatch.setitem(sys.modules, "ffcv.loader", None)
    with pytest.raises(SettingsError, match="--pipeline ffcv needs FFCV, which cannot be imported") as caught:
        build(tmp_path, pipeline="ffcv", batch_size=4)
    assert str(caught.value).endswith(
        "\n  apt-get install -y --no-install-recommends libturbojpeg0-dev libopencv-dev pkg-config"
        " && pip install 'spark-fast[ffcv]'"
    )


@pytest.mark.ffcv
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_are_as_the_contract_says(image_folder, beton_folder, dtype):
    folder = beton_folder(image_folder(26))
    labels = detect_source(folder).labels
    got = batches(folder, batch_size=6, input_size=(32, 48), dtype=dtype)
    assert len(got) == 4  # of 6; the last 2 images are dropped
    for images, targets, ids in got:
        assert images.shape == (6, 3, 32, 48)
        assert images.dtype == dtype
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert ids.dtype == targets.dtype == torch.int64
        assert targets.tolist() == labels[ids.numpy()].tolist()
    assert len({i for batch in got for i in batch.ids.tolist()}) == 24


@pytest.mark.ffcv
@pytest.mark.parametrize(
    ("raw", "resize", "mean"), [(0, "bicubic", 2), (1, "bicubic", 0.3), (0, "area", 4), (1, "area", 4)]
)
def test_an_image_is_what_the_published_transforms_would_make_of_it(image_folder, beton_folder, raw, resize, mean):
    root = image_folder()
    source = detect_source(root)
    folder = beton_folder(root, raw)
    (images, _, ids), *_ = batches(folder, epoch=3, input_size=(48, 32), ffcv_resize=resize)
    mirrored = set()
    for image, i in zip(pixels(images), ids.tolist(), strict=True):
        pil = Image.open(source.root / source.name(i))
        box, flipped = drawn(Augmentation((48, 32)), 5, 3, i, pil.height, pil.width)
        assert np.abs(image - reference(pil, box, flipped, (48, 32))).mean() < mean
        mirrored.add(flipped)
    assert len(mirrored) == 2


@pytest.mark.ffcv
@pytest.mark.parametrize(("raw", "resize", "mean"), [(0, "bicubic", 4), (1, "bicubic", 0.3), (0, "area", 6)])
def test_real_images_are_within_the_tolerance_of_pillow(imagenet_sample, beton_folder, raw, resize, mean):
    folder = beton_folder(imagenet_sample, raw)
    source = detect_source(folder)
    differences = []
    for images, _, ids in batches(folder, batch_size=48, input_size=224, ffcv_resize=resize)[:2]:
        for image, i in zip(pixels(images), ids.tolist(), strict=True):
            pil = Image.open(io.BytesIO(source.read(i))).convert("RGB")
            box, flipped = drawn(Augmentation(), 5, 0, i, pil.height, pil.width)
            differences.append(np.abs(image - reference(pil, box, flipped, (224, 224))).mean())
    assert np.max(differences) < mean


@pytest.mark.ffcv
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_sees_what_torch_sees_on_one(beton_folder, world):
    folder = beton_folder()
    ranks = [batches(folder, epoch=1, rank=rank, world_size=world) for rank in range(world)]
    together = [
        Batch(*(torch.cat(parts) for parts in zip(*shares, strict=True))) for shares in zip(*ranks, strict=True)
    ]
    assert alike(together, batches(folder, epoch=1, pipeline="torch"), CLOSE)
    assert same(together, batches(folder, epoch=1))


@pytest.mark.ffcv
@pytest.mark.parametrize("start", range(5))
def test_starting_at_a_step_gives_the_tail_of_the_epoch(beton_folder, start):
    folder = beton_folder()
    tail = batches(folder, epoch=2, start_step=start, batch_size=6)
    assert same(tail, batches(folder, epoch=2, batch_size=6)[start:])
    if tail:
        assert alike(tail, batches(folder, epoch=2, start_step=start, batch_size=6, pipeline="torch"), CLOSE)


@pytest.mark.ffcv
@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (3, 5), (64, 2)])
def test_workers_and_prefetch_change_nothing(beton_folder, workers, prefetch):
    folder = beton_folder()
    assert same(batches(folder, workers=workers, prefetch=prefetch, batch_size=4), batches(folder, batch_size=4))


@pytest.mark.ffcv
def test_central_crops_are_those_of_torch(beton_folder):
    folder = beton_folder()
    settings = {"augment": False, "input_size": (24, 40)}
    assert alike(batches(folder, **settings), batches(folder, pipeline="torch", **settings), CLOSE)


@pytest.mark.ffcv
def test_every_image_comes_once_an_epoch_and_epochs_differ(beton_folder):
    pipeline = build(beton_folder(), pipeline="ffcv", batch_size=6, input_size=32)
    orders = [[i for batch in pipeline.epoch(epoch) for i in batch.ids.tolist()] for epoch in range(4)]
    assert all(sorted(ids) == list(range(24)) for ids in orders)
    assert len({tuple(ids) for ids in orders}) == 4
    pipeline.close()


@pytest.mark.ffcv
def test_a_delivered_batch_is_never_written_again(beton_folder):
    pipeline = build(beton_folder(), pipeline="ffcv", batch_size=4, input_size=32, prefetch=1)
    kept = [(batch.images, batch.images.clone()) for epoch in range(3) for batch in pipeline.epoch(epoch)]
    pipeline.close()
    assert all(torch.equal(images, copy) for images, copy in kept)


@pytest.mark.ffcv
def test_one_pipeline_serves_two_epochs_at_once(beton_folder):
    folder = beton_folder()
    pipeline = build(folder, pipeline="ffcv", batch_size=6, input_size=32, seed=5)
    pairs = list(zip(pipeline.epoch(0), pipeline.epoch(1), strict=True))
    assert same([a for a, _ in pairs], batches(folder, epoch=0, batch_size=6))
    assert same([b for _, b in pairs], batches(folder, epoch=1, batch_size=6))
    pipeline.close()


@pytest.mark.ffcv
def test_leaving_epochs_early_disturbs_none_of_the_following(beton_folder):
    folder = beton_folder()
    pipeline = build(folder, pipeline="ffcv", batch_size=4, input_size=32, seed=5, prefetch=4)
    for epoch in range(10):
        iterator = pipeline.epoch(epoch)
        next(iterator)
        iterator.close()
    assert same(list(pipeline.epoch(0)), batches(folder, batch_size=4))
    assert pipeline.bad_images.read == 10 * 4 + 24  # counted when delivered
    pipeline.close()


@pytest.mark.ffcv
def test_torchs_threads_are_left_alone_and_close_ends_ours(beton_folder):
    folder = beton_folder()
    before = torch.get_num_threads()
    pipeline = build(folder, pipeline="ffcv", batch_size=4, input_size=32, prefetch=1, workers=1)
    iterator = pipeline.epoch(0)
    next(iterator)
    assert torch.get_num_threads() == before
    pipeline.close()
    pipeline.close()
    with pytest.raises(RuntimeError, match="closed while it was being read"):
        list(iterator)
    with pytest.raises(RuntimeError, match="was closed"):
        pipeline.epoch(0)
    assert not [thread for thread in threading.enumerate() if "PlannedEpoch" in repr(thread)]


@pytest.mark.ffcv
def test_a_file_cut_short_while_in_use_is_an_error_not_a_crash(beton_folder):
    folder = beton_folder()
    pipeline = build(folder, pipeline="ffcv", batch_size=6, input_size=32)
    list(pipeline.epoch(0))
    with (folder / BETON).open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(DataError, match="has changed its size while in use"):
        list(pipeline.epoch(1))
    pipeline.close()


@pytest.mark.ffcv
def test_an_unknown_resize_and_a_folder_without_a_beton_are_refused(image_folder, beton_folder):
    with pytest.raises(SettingsError, match="'cubic' is unknown; choose one of bicubic, area"):
        batches(beton_folder(), ffcv_resize="cubic")
    with pytest.raises(DataError, match=r"reads a .beton, and there is none at"):
        batches(image_folder(name="other"))


@pytest.mark.ffcv
@ways_to_end
def test_the_program_ends_with_an_epoch_left_open(beton_folder, then, code):
    ended = left_open(beton_folder(), "ffcv", 4, then)
    assert (ended.returncode, ended.stdout) == (code, "running\n"), ended.stderr


@pytest.mark.ffcv
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_cuda_the_batches_are_those_of_the_cpu(beton_folder):
    folder = beton_folder()
    ours = [batch._replace(images=batch.images.cpu(), labels=batch.labels.cpu())
            for batch in batches(folder, device="cuda")]  # fmt: skip
    assert alike(ours, batches(folder), 0.1)
