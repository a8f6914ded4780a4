"""What every backend that decodes keeps: the same batches on any workers and ranks, from any step; nearly torch's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from spark_fast.pipelines import Batch
from spark_fast.pipelines.sources.detect import detect_source
from tests.commands import HANG_SECONDS
from tests.pipelines.building import build
from tests.pipelines.comparing import alike, batches, same


class Backend(NamedTuple):
    name: str
    stored: Callable[..., Path]  # makes so many images, and gives the folder that the backend reads
    tolerance: float  # mean difference of an image from torch's, of 255

    @property
    def batches(self) -> Callable[..., list[Batch]]:
        return partial(batches, pipeline=self.name, batch_size=12)


@pytest.fixture(
    params=["torch", pytest.param("dali", marks=pytest.mark.dali), pytest.param("ffcv", marks=pytest.mark.ffcv)]
)
def backend(request, image_folder, beton_folder) -> Backend:
    if request.param == "ffcv":  # half of the records are raw; its decoder has a faster, rougher DCT
        return Backend("ffcv", lambda count=24: beton_folder(image_folder(count)), 2.0)
    return Backend(request.param, image_folder, 0.6 if request.param == "dali" else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_dtypes_and_labels(backend, dtype):
    folder = backend.stored(26)
    labels = detect_source(folder).labels
    got = backend.batches(folder, batch_size=6, input_size=(32, 48), dtype=dtype)
    assert len(got) == 4  # of 6; the last 2 images are dropped
    for images, targets, ids in got:
        assert images.shape == (6, 3, 32, 48)
        assert images.dtype == dtype
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert ids.dtype == targets.dtype == torch.int64
        assert targets.tolist() == labels[ids.numpy()].tolist()
    assert len({i for batch in got for i in batch.ids.tolist()}) == 24


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_sees_what_torch_sees_on_one(backend, world):
    folder = backend.stored()
    ranks = [backend.batches(folder, epoch=1, rank=rank, world_size=world) for rank in range(world)]
    together = [
        Batch(*(torch.cat(parts) for parts in zip(*shares, strict=True))) for shares in zip(*ranks, strict=True)
    ]
    assert alike(together, backend.batches(folder, epoch=1, pipeline="torch"), backend.tolerance)
    assert same(together, backend.batches(folder, epoch=1))


@pytest.mark.parametrize("start", range(5))
def test_starting_at_a_step_gives_the_tail_of_the_epoch(backend, start):
    folder = backend.stored()
    tail = backend.batches(folder, epoch=2, start_step=start, batch_size=6)
    assert same(tail, backend.batches(folder, epoch=2, batch_size=6)[start:])
    if tail:
        theirs = batches(folder, epoch=2, start_step=start, batch_size=6, pipeline="torch")
        assert alike(tail, theirs, backend.tolerance)


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (1, 5), (4, 1), (64, 2)])
def test_workers_and_prefetch_change_nothing(backend, workers, prefetch):
    folder, processes = backend.stored(), {"worker_processes": 0}
    got = backend.batches(folder, workers=workers, prefetch=prefetch, batch_size=4, **processes)
    assert same(got, backend.batches(folder, workers=2, batch_size=4, **processes))


def test_every_image_comes_once_an_epoch_and_epochs_differ(backend):
    pipeline = build(backend.stored(), pipeline=backend.name, batch_size=6, input_size=32)
    orders = [[i for batch in pipeline.epoch(epoch) for i in batch.ids.tolist()] for epoch in range(4)]
    assert all(sorted(ids) == list(range(24)) for ids in orders)
    assert len({tuple(ids) for ids in orders}) == 4
    pipeline.close()


def test_a_delivered_batch_is_never_written_again(backend):
    pipeline = build(backend.stored(), pipeline=backend.name, batch_size=4, input_size=32, prefetch=1)
    kept = [(batch.images, batch.images.clone()) for epoch in range(3) for batch in pipeline.epoch(epoch)]
    pipeline.close()
    assert all(torch.equal(images, copy) for images, copy in kept)
    assert len({images.data_ptr() for images, _ in kept}) == 18


def test_one_pipeline_serves_two_epochs_at_once(backend):
    folder = backend.stored()
    pipeline = build(folder, pipeline=backend.name, batch_size=6, input_size=32, seed=5)
    pairs = list(zip(pipeline.epoch(0), pipeline.epoch(1), strict=True))
    assert same([a for a, _ in pairs], backend.batches(folder, epoch=0, batch_size=6))
    assert same([b for _, b in pairs], backend.batches(folder, epoch=1, batch_size=6))
    pipeline.close()


def test_leaving_epochs_early_disturbs_none_of_the_following(backend):
    folder = backend.stored()
    pipeline = build(folder, pipeline=backend.name, batch_size=4, input_size=32, seed=5, prefetch=4)
    for epoch in range(10):
        iterator = pipeline.epoch(epoch)
        next(iterator)
        iterator.close()
    assert same(list(pipeline.epoch(0)), backend.batches(folder, batch_size=4))
    assert pipeline.bad_images.read == 10 * 4 + 24  # counted when delivered
    pipeline.close()


SCRIPT = """
import sys, time
from spark_fast.pipelines import LoaderOptions, build_pipeline
path, pipeline = sys.argv[1:]
pipeline = build_pipeline(path, LoaderOptions(12, pipeline, input_size=256, workers=2, prefetch=2))
iterator = pipeline.epoch(0)
next(iterator)
print("running", flush=True)
"""
CTRL_C = "import os, signal; os.kill(os.getpid(), signal.SIGINT); time.sleep(30)"


@pytest.mark.slow
@pytest.mark.parametrize(("then", "code"), [("", 0), (CTRL_C, -2)], ids=["end", "ctrl_c"])
def test_a_program_ends_with_an_epoch_left_open(backend, then, code):
    command = [sys.executable, "-c", SCRIPT + then, str(backend.stored()), backend.name]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert (ended.returncode, ended.stdout) == (code, "running\n"), ended.stderr
    assert code == 0 or "KeyboardInterrupt" in ended.stderr
