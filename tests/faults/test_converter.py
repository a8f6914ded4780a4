"""The converter killed, out of disk, and with workers that die, hang or raise (faults 21 and 23)."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from spark_fast.errors import DataError, StorageError
from spark_fast.files import PARTIAL
from spark_fast.pipelines.convert import process_pool as processes
from spark_fast.pipelines.convert.beton_writer import BetonSettings
from spark_fast.pipelines.convert.conversion import ConvertSettings, Progress, convert
from spark_fast.pipelines.convert.process_pool import run_jobs
from spark_fast.pipelines.convert.reencode import Reencode
from spark_fast.pipelines.convert.verify_shards import verify_shards
from spark_fast.pipelines.sources.beton import BetonSource
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.sources.shard_format import BETON, MANIFEST, read_manifest
from tests.faults import jobs
from tests.pipelines.convert.test_conversion import contents
from tests.pipelines.damage import flip
from tests.pipelines.pictures import jpeg

ROOT = Path(__file__).parents[2]
SHARDS = 12


def settings(src: Path, short_side: int = 256) -> ConvertSettings:
    return ConvertSettings(Reencode(short_side=short_side), images_per_shard=-(-len(detect_source(src)) // SHARDS))


def convert_here(src: Path, dst: Path, form: str, made: ConvertSettings) -> None:
    """What the command does, without the seconds that its processes take to start."""
    beton = None if form == "shards" else BetonSettings(alone=form == "ffcv")
    ((folder, _),) = convert(src, dst, made, beton=beton)
    assert verify_shards(folder, workers=2) == []


def start(src: Path, dst: Path, form: str, made: ConvertSettings, *more: str) -> subprocess.Popen[str]:
    """The converter as a person starts it, with two worker processes and `more` flags."""
    words = [sys.executable, "-m", "spark_fast.cli.convert", str(src), str(dst), "--workers", "2", "--format", form]
    words += ["--images_per_shard", str(made.images_per_shard), "--short_side", str(made.images.short_side), *more]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


@pytest.fixture
def cifar10(tmp_path: Path, imagenet_sample: Path, times: Callable) -> Path:
    """CIFAR-10 as class folders: some of it, or all."""
    archive = imagenet_sample.parent / "cifar10.tar.gz"
    if not archive.exists():
        pytest.skip(f"no CIFAR-10 at {archive}")
    every = times(100, 1)
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and int(Path(member.name).stem) % every == 0:
                path = tmp_path / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
    return tmp_path / "cifar10"


def progress(folder: Path) -> int:
    """0 ... SHARDS shards are whole; then there is a manifest; then the .beton is being written."""
    if (folder / f"{BETON}{PARTIAL}").exists():
        return SHARDS + 2
    return SHARDS + 1 if (folder / MANIFEST).exists() else len(list(folder.glob("shard-*.json")))


def killed(process: subprocess.Popen[str], folder: Path, moment: float) -> bool:
    """Kill with SIGKILL, when `progress` has come to `moment` and a fraction of 0.1 s later; False: it was done."""
    while progress(folder) < int(moment) and process.poll() is None:
        time.sleep(0.001)
    time.sleep(moment % 1 / 10)
    process.kill()
    said, _ = process.communicate()  # its children hold the pipe: this returns when they are gone, too
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode != 0


def only_whole_files_count(folder: Path) -> None:
    """In an unfinished folder, what has its final name is whole, and the folder is not taken for data."""
    for path in folder.glob("shard-*.tar"):
        with tarfile.open(path) as tar:
            assert [member.name for member in tar][-1].endswith((".cls", ".jpg", ".npy"))
    if (folder / BETON).exists():
        assert len(BetonSource(folder / BETON)) == read_manifest(folder).count
    if not (folder / MANIFEST).exists() and list(folder.glob("shard-*.tar*")):
        with pytest.raises(DataError, match="was not finished"):
            detect_source(folder)
    for path in folder.glob(f"*{PARTIAL}"):
        with pytest.raises(DataError):
            detect_source(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("imagenet_sample", "shards"),
        ("cifar10", "shards"),
        pytest.param("imagenet_sample", "ffcv", marks=pytest.mark.ffcv),
    ],
)
def test_killed_at_random_moments_and_started_again_it_ends_with_the_same_bytes(tmp_path, times, request, source, form):
    seed = 21
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    src, dst, whole = request.getfixturevalue(source) / "train", tmp_path / "out", tmp_path / "whole"
    made = settings(src)
    convert_here(src, whole, form, made)
    kills = landed = 0
    while landed < times(1, 10):
        kills += 1
        assert kills < 100
        if killed(start(src, dst, form, made), dst, random.uniform(0, SHARDS + (1 if form == "shards" else 3))):
            landed += 1
            only_whole_files_count(dst)
        else:
            assert contents(dst) == contents(whole)
            shutil.rmtree(dst)
    print(f"{landed} kills landed in unfinished conversions, {kills - landed} came too late")
    convert_here(src, dst, form, made)
    assert contents(dst) == contents(whole)
    assert detect_source(dst).labels is not None
    damaged = next(path for name in (BETON, "shard-000003.tar") if (path := dst / name).exists())
    flip(damaged, damaged.stat().st_size // 2)
    assert any(damaged.name in fault for fault in verify_shards(dst, workers=2))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a real file system of the size asked for; again, it changes the size."""
    place = tmp_path / "disk"

    def mount(size: str) -> Path:
        how = ["-o", f"remount,size={size}"] if place.exists() else ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
        place.mkdir(exist_ok=True)
        done = subprocess.run(["mount", *how, str(place)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here, which needs root: {done.stderr.strip()}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "size"), [("shards", "512k"), pytest.param("both", "4m", marks=pytest.mark.ffcv)])
def test_a_full_disk_leaves_whole_shards_and_with_room_it_goes_on(tmp_path, small_disk, form, size):
    src, dst = tmp_path / "src", small_disk(size)
    for i in range(48):
        (src / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (src / str(i % 3) / f"{i}.jpg").write_bytes(jpeg(i, 400, 500) + bytes(10_000))
    made = settings(src, short_side=0)
    process = start(src, dst, form, made)
    said, _ = process.communicate()
    assert process.returncode == 6, said
    assert "the disk is full. Finished shards are kept: free some space and run the same command again" in said
    assert "Traceback" not in said
    left = [path.name for path in dst.iterdir()]
    assert any(name.endswith(".tar") for name in left)
    assert not any(name.endswith(PARTIAL) or name.startswith(BETON + ".n") or name == BETON for name in left)
    assert (MANIFEST in left) == (form == "both")  # only the .beton did not fit
    small_disk("64m")
    convert_here(src, dst, form, made)


def a_worker(k: int) -> int:
    """One of those that are at work, not still starting: they catch SIGSEGV, to say where it was."""
    children = sorted(child.pid for child in multiprocessing.active_children())
    caught = [re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1] for pid in children]
    at_work = [pid for pid, mask in zip(children, caught, strict=True) if int(mask, 16) >> (signal.SIGSEGV - 1) & 1]
    return at_work[k % len(at_work)]


def convert_with_signal(root: Path, out: Path, made: ConvertSettings, number: signal.Signals, k: int) -> None:
    """Convert in two processes, one of which gets a signal after some images; again, should that come too late."""
    for _ in range(20):
        shutil.rmtree(out, ignore_errors=True)
        sent: list[int] = []

        def inject(progress: Progress, sent: list[int] = sent) -> None:
            if progress.done > 2 * k and not sent:
                sent.append(a_worker(k))
                os.kill(sent[0], number)

        convert(root, out, made, workers=2, on_progress=inject)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_is_stopped_is_named_with_its_image(
    image_folder, tmp_path, times, monkeypatch, capfd, number
):
    """The signal is sent to a worker process in the middle of its work; the same call then goes on."""
    monkeypatch.setattr(processes, "SILENT_SECONDS", times(1, 10))
    root, made = image_folder(), ConvertSettings(images_per_shard=5)
    convert(root, tmp_path / "whole", made)
    for k in range(times(1, 5)):
        out = tmp_path / str(k)
        with pytest.raises(StorageError) as caught:
            convert_with_signal(root, out, made, number, k)
        message = str(caught.value)
        if number == signal.SIGSTOP:
            assert "has been silent for" in message
            assert "s (stopped) at" in message
        else:
            assert f"a worker process died ({number.name}, exit code -{number}" in message
        assert f"at {out / 'train' / 'shard-00000'}" in message or "at no job" in message
        assert "Finished shards are kept: run the same command again" in message
        assert not multiprocessing.active_children()
        assert not list(out.rglob(f"*{PARTIAL}"))
        convert(root, out, made)
        assert contents(out) == contents(tmp_path / "whole")
    if number == signal.SIGSEGV:
        assert "Fatal Python error: Segmentation fault" in capfd.readouterr().err  # and where it was


def nowhere(images: int, size: int) -> None:
    pass


@pytest.mark.slow
def test_a_worker_that_raises_gives_its_own_traceback_and_image(times):
    for _ in range(times(1, 5)):
        with pytest.raises(RuntimeError, match=r"in a worker process, at photo 2 of a:\nTraceback") as caught:
            run_jobs(jobs.raising, ["a"] * 3, 2, nowhere, lambda job, done: f"photo {done} of {job}")
        assert "in raising" in str(caught.value)
        assert "ZeroDivisionError: a" in str(caught.value)
        assert not multiprocessing.active_children()


def test_a_worker_that_hangs_is_reported_and_then_given_up(monkeypatch, caplog):
    for patience, seconds in (("IDLE", 0.5), ("SILENT", 0.5), ("STALL", 2.0)):
        monkeypatch.setattr(processes, f"{patience}_SECONDS", seconds)
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.1)
    with (
        caplog.at_level(logging.WARNING, "spark_fast.pipelines"),
        pytest.raises(StorageError, match="at job 600: given up"),
    ):
        run_jobs(jobs.silent, [600.0] * 2, 2, nowhere, lambda job, done: f"job {job:.0f}")
    assert "has been silent for" in caplog.text
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_worker_that_is_slow_to_start_and_to_end_is_given_time(monkeypatch, caplog):
    """Importing takes it seconds: at work it would be told of after so long a silence."""
    monkeypatch.setattr(processes, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.05)
    run_jobs(jobs.silent, [0.0] * 2, 2, nowhere, lambda job, done: "nowhere")
    assert not caplog.messages
