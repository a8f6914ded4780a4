"""Worker processes make the batches that this process makes, whatever happens to them."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from spark_fast.errors import DataError, StorageError
from spark_fast.pipelines.backends.torch_pipeline import TorchPipeline
from spark_fast.pipelines.backends.workers import decoder_processes
from spark_fast.pipelines.backends.workers.decoder_processes import MANY_BLOCKS, DecoderProcesses, _order_size
from spark_fast.pipelines.convert.conversion import ConvertSettings, convert
from tests.commands import HANG_SECONDS
from tests.pipelines.backends.workers.saboteur import Saboteur, sabotaged
from tests.pipelines.bands import bands, npy_of
from tests.pipelines.building import build
from tests.pipelines.comparing import batches, same
from tests.pipelines.pictures import encoded, jpeg, picture


def pictures(root: Path, count: int = 24) -> Path:
    """Three classes; image 3 is no image, 5 is grey."""
    for i in range(count):
        path = root / f"class{3 * i // count}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i, 50 + i % 7, 60 + i % 11))
    (root / "class0" / "003.jpg").write_bytes(b"no image")
    (root / "class0" / "005.jpg").write_bytes(encoded(Image.fromarray(picture(5)).convert("L"), "JPEG"))
    return root


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[tuple[TorchPipeline, Saboteur, Path]]:
    """One pipeline with two worker processes for all of these tests: to start them costs seconds."""
    root = pictures(tmp_path_factory.mktemp("data") / "set")
    pipeline, source = sabotaged(root)
    yield pipeline, source, root
    pipeline.close()


def expected(root: Path, epoch: int = 0, start_step: int = 0) -> list:
    return batches(root, epoch, start_step, batch_size=4, max_bad_fraction=1.0, worker_processes=0)


def filler(pipeline: TorchPipeline) -> DecoderProcesses:
    assert isinstance(pipeline._filler, DecoderProcesses)
    return pipeline._filler


def test_they_make_the_batches_of_this_process_and_count_the_same(running):
    pipeline, _, root = running
    own = build(root, batch_size=4, input_size=32, seed=5, max_bad_fraction=1.0)
    for epoch, start in ((0, 0), (1, 0), (1, 4)):
        assert same(list(pipeline.epoch(epoch, start)), list(own.epoch(epoch, start)))
    assert pipeline.bad_images == own.bad_images
    assert pipeline.bad_images.substituted >= 2
    assert pipeline.bad_images.converted >= 2
    own.close()


def test_two_epochs_at_once(running):
    pipeline, _, root = running
    pairs = list(zip(pipeline.epoch(2), pipeline.epoch(3), strict=True))
    assert same([a for a, _ in pairs], expected(root, 2))
    assert same([b for _, b in pairs], expected(root, 3))


def test_an_epoch_that_is_left_early_leaves_no_order_behind(running):
    pipeline, _, root = running
    for epoch in range(3):
        iterator = pipeline.epoch(epoch)
        next(iterator)
        iterator.close()
        assert not any(worker.images for worker in filler(pipeline).workers)
    assert same(list(pipeline.epoch(4)), expected(root, 4))


def test_memory_is_used_again_but_not_what_the_consumer_keeps(running):
    pipeline, _, root = running
    kept = list(pipeline.epoch(5))
    addresses = {batch.images.data_ptr() for epoch in range(3) for batch in pipeline.epoch(epoch)}
    assert len(addresses) <= 4
    assert same(kept, expected(root, 5))


def test_a_consumer_that_keeps_many_batches_gets_copies(running):
    pipeline, _, root = running
    kept = [batch for epoch in range(8) for batch in pipeline.epoch(epoch)]
    assert len(kept) == 48
    assert len(filler(pipeline)._blocks) <= MANY_BLOCKS + 4
    assert same(kept, [batch for epoch in range(8) for batch in expected(root, epoch)])
    del kept
    list(pipeline.epoch(0))
    assert len(filler(pipeline)._blocks) <= 6, "what nobody keeps is dropped"


def test_a_worker_that_is_killed_is_replaced_and_named(running, caplog):
    pipeline, source, root = running
    with caplog.at_level(logging.WARNING, "spark_fast.pipelines"):
        source.order(7, "die once")
        assert same(list(pipeline.epoch(6)), expected(root, 6))
    (said,) = [message for message in caplog.messages if "ended" in message]
    assert "SIGKILL; usually that means that memory ran out" in said
    assert "image 7 (class0/007.jpg)" in said
    assert "decoded again" in said


def test_a_worker_that_is_stopped_is_replaced_and_named(running, caplog, monkeypatch):
    monkeypatch.setattr(decoder_processes, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(decoder_processes, "SILENT_SECONDS", 0.2)
    pipeline, source, root = running
    with caplog.at_level(logging.WARNING, "spark_fast.pipelines"):
        source.order(8, "stop once")
        assert same(list(pipeline.epoch(7)), expected(root, 7))
    (said,) = [message for message in caplog.messages if "was stopped" in message]
    assert "image 8 (class1/008.jpg)" in said


def test_an_exception_names_its_image_and_says_where_and_the_workers_live_on(running):
    pipeline, source, root = running
    source.order(9, "divide")
    before = list(filler(pipeline).workers)
    with pytest.raises(RuntimeError, match=r"while loading image 9 \(class1/009.jpg\): ZeroDivisionError") as caught:
        list(pipeline.epoch(8))
    assert "saboteur.py" in str(caught.value.__cause__)
    source.mend(9)
    assert same(list(pipeline.epoch(8)), expected(root, 8))
    assert filler(pipeline).workers == before


def test_the_process_that_is_forked_from_runs_no_thread_and_maps_no_name(running):
    pipeline, _, _ = running
    list(pipeline.epoch(0))
    first = filler(pipeline)._group._first.pid  # type: ignore[union-attr]
    assert len(list(Path(f"/proc/{first}/task").iterdir())) == 1
    for worker in filler(pipeline).workers:
        assert "/dev/shm" not in Path(f"/proc/{worker.pid}/maps").read_text()


@pytest.mark.parametrize(
    ("images", "workers", "size"), [(64, 2, 16), (64, 1, 32), (16, 8, 2), (1, 3, 1), (4096, 4, 512), (10, 3, 4)]
)
def test_a_batch_is_a_few_orders_for_each_worker(images, workers, size):
    assert _order_size(images, workers) == size


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def await_end(pids: list[int]) -> None:
    """Until these processes have ended."""
    end = time.monotonic() + HANG_SECONDS
    while any(map(alive, pids)):
        assert time.monotonic() < end, f"of {pids} some are left"
        time.sleep(0.02)


@pytest.mark.slow
def test_an_image_that_ends_three_workers_ends_the_run_and_another_may_follow(tmp_path, caplog):
    pipeline, source = sabotaged(pictures(tmp_path / "set"))
    source.order(10, "die")
    with (
        caplog.at_level(logging.WARNING, "spark_fast.pipelines"),
        pytest.raises(StorageError, match=r"image 10 \(class1/010.jpg\).* So did 2 before it: given up"),
    ):
        list(pipeline.epoch(0))
    assert len([message for message in caplog.messages if "decoded again" in message]) == 2
    source.mend(10)
    assert same(list(pipeline.epoch(0)), expected(tmp_path / "set"))
    pids = [worker.pid for worker in filler(pipeline).workers]
    pipeline.close()
    await_end(pids)
    with pytest.raises(RuntimeError, match="was closed"):
        pipeline.epoch(0)


@pytest.mark.slow
def test_when_the_process_that_forks_them_is_killed_all_are_replaced(tmp_path, caplog):
    pipeline, _ = sabotaged(pictures(tmp_path / "set"))
    epoch = pipeline.epoch(0)
    made = [next(epoch)]
    os.kill(filler(pipeline)._group._first.pid, signal.SIGKILL)  # type: ignore[union-attr]
    await_end([worker.pid for worker in filler(pipeline).workers])
    with caplog.at_level(logging.WARNING, "spark_fast.pipelines"):
        made += list(epoch) + list(pipeline.epoch(1))
    pipeline.close()
    assert any("the process that starts them had: SIGKILL" in message for message in caplog.messages)
    assert same(made, expected(tmp_path / "set") + expected(tmp_path / "set", 1))


@pytest.mark.slow
def test_data_that_changed_before_the_workers_open_them_are_named(image_folder, tmp_path):
    ((folder, _),) = convert(image_folder(), tmp_path / "shards", ConvertSettings(images_per_shard=10))
    pipeline = build(folder, pipeline="torch", batch_size=6, input_size=32, workers=2, worker_processes=1)
    shard = next(folder.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match="it was truncated or changed") as caught:
        list(pipeline.epoch(0))
    assert shard.name in str(caught.value)
    pipeline.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "processes"),
    [
        ("folder", 1),
        ("shards", 3),
        ("bands on the device", 3),
        pytest.param("beton", 1, marks=pytest.mark.ffcv),
        *(
            pytest.param(*case, marks=pytest.mark.drill)
            for case in (("folder", 3), ("shards", 1), ("device", 1), ("device", 3), ("bands", 1), ("bands", 3))
        ),
    ],
)
def test_every_kind_of_data_and_every_way_to_augment(image_folder, request, tmp_path, kind, processes):
    asked: dict[str, object] = {"workers": 4, "vflip": True, "rot90": True, "max_bad_fraction": 1.0}
    if kind.startswith("bands"):
        root = tmp_path / "bands"
        for i in range(24):
            path = root / f"class{i % 3}" / f"{i}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(npy_of(bands(i, 50, 60, 12, "uint16")))
        asked |= {"in_chans": 12}
    else:
        root = image_folder()
    if kind == "shards":
        ((root, _),) = convert(root, tmp_path / "shards", ConvertSettings(images_per_shard=10))
    if kind == "beton":
        root = next(request.getfixturevalue("beton_folder")(root).glob("*.beton"))
    if kind.endswith("device"):
        asked["augment_on"] = "device"
    own = batches(root, 1, 1, pipeline="torch", worker_processes=0, **asked)
    assert same(batches(root, 1, 1, pipeline="torch", worker_processes=processes, **asked), own)
    ranks = [
        batches(root, 1, 1, pipeline="torch", worker_processes=processes, rank=rank, world_size=2, **asked)
        for rank in range(2)
    ]
    for whole, *parts in zip(own, *ranks, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert torch.equal(whole.ids, torch.cat([part.ids for part in parts]))


SCRIPT = """
import os, signal, sys, time
from spark_fast.pipelines import LoaderOptions, build_pipeline
options = LoaderOptions(batch_size=4, input_size=32, workers=2, worker_processes=2, max_bad_fraction=1.0)
pipeline = build_pipeline(sys.argv[1], options)
epoch = pipeline.epoch(0)
next(epoch)
group = pipeline._filler._group
if "stop" in sys.argv:
    os.kill(pipeline._filler.workers[0].pid, signal.SIGSTOP)
print(group._first.pid, *(worker.pid for worker in pipeline._filler.workers), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("then", "words", "code"),
    [
        ("", [], 0),  # the epoch is left open
        ("os.killpg(os.getpid(), signal.SIGINT); time.sleep(60)", [], -signal.SIGINT),
        ("os.kill(os.getpid(), signal.SIGKILL)", [], -signal.SIGKILL),
        ("os.kill(os.getpid(), signal.SIGKILL)", ["stop"], -signal.SIGKILL),
    ],
)
def test_however_the_program_ends_no_process_is_left(tmp_path, then, words, code):
    command = [sys.executable, "-c", SCRIPT + then, str(pictures(tmp_path / "set")), *words]
    program = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    out, error = program.communicate(timeout=HANG_SECONDS)  # until the last process has closed its end
    assert program.returncode == code, error
    pids = [int(pid) for pid in out.split()]
    assert len(pids) == 3, error
    await_end(pids)
    assert "worker_process" not in error, "the workers say nothing"
