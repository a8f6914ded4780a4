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
from spark_fast.pipelines.sources.beton import CHECKS, checks_path, sealed_checks
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.sources.shard_format import BETON
from spark_fast.pipelines.transforms.crops import Augmentation
from tests.pipelines.building import build
from tests.pipelines.comparing import alike, pixels
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
def test_central_crops_are_those_of_torch(beton_folder):
    folder = beton_folder()
    settings = {"augment": False, "input_size": (24, 40)}
    assert alike(batches(folder, **settings), batches(folder, pipeline="torch", **settings), CLOSE)


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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_cuda_the_batches_are_those_of_the_cpu(beton_folder):
    folder = beton_folder()
    ours = [batch._replace(images=batch.images.cpu(), labels=batch.labels.cpu())
            for batch in batches(folder, device="cuda")]  # fmt: skip
    assert alike(ours, batches(folder), 0.1)
