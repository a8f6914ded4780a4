"""Drills of the storage side: kills inside a save, damaged files, full disks, signals. Real ones."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from spark_fast.checkpoint import file as checkpoint
from spark_fast.checkpoint.file import read
from spark_fast.checkpoint.manager import (
    CHECKPOINT,
    FOLDER,
    RECORD,
    CheckpointManager,
    candidates,
    published,
    read_newest,
)
from spark_fast.checkpoint.validate_file import sidecar
from spark_fast.cli.train import main
from tests.checkpoint.test_file import trained
from tests.cli.tiny_run import TINY, assert_same_weights, here, pictures  # noqa: F401
from tests.faults import saboteur
from tests.processes import run_forked

STEPS = 6  # of a run here, one epoch


def state(step):
    model, optimizer = trained(seed=step)
    rest = {"epoch": 0, "loss": 0.5, "num_samples": 8, "scaler": {}, "settings": {"run": {"seed": 0}}}
    return checkpoint.run_state(model, optimizer, step=step, random_state=checkpoint.random_state(), **rest)


def killed(write, point):
    """Call `write` in a process of its own that is killed at this point."""
    child = os.fork()
    if child == 0:
        try:
            # the pickle is written in one piece, the tensors after it: the tenth write lies among them
            saboteur.arm(point, 10 if point == "half written" else 1, saboteur.kill)
            write()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("point", saboteur.POINTS)
def test_killed_inside_a_save_the_one_before_or_the_new_one_is_whole(tmp_path, caplog, point):
    """Row 2: every point of a save, five times in a row in the same folder."""
    store, whole = CheckpointManager(tmp_path, keep_last=2, keep_steps=0), 3
    for step in (1, 2, 3):
        store.write(step, state(step))
    for step in range(4, 9):
        content = state(step)
        assert killed(lambda step=step, content=content: store.write(step, content), point) == -signal.SIGKILL
        left = [p.name for p in tmp_path.rglob("*.partial")]
        _, found = read_newest(candidates(tmp_path))
        assert found["step"] in (whole, step)
        assert found["step"] == (step if (tmp_path / FOLDER / f"step_{step:08d}.pth").exists() else whole)
        assert torch.equal(found["model"]["first.weight"], state(found["step"])["model"]["first.weight"])
        assert read(tmp_path / CHECKPOINT)["step"] in (whole, step), "the link never leads to half a file"
        assert len(published(tmp_path)) >= 2
        caplog.clear()
        store.clean(found["step"])
        assert read(tmp_path / CHECKPOINT)["step"] == found["step"]
        assert all(name in caplog.text for name in left)
        assert not list(tmp_path.rglob("*.partial"))
        assert len(list(tmp_path.rglob("*.sha256"))) == len(published(tmp_path))
        whole = found["step"]


@pytest.mark.slow
def test_no_truncated_and_no_flipped_file_is_loaded(tmp_path):
    """Row 8: 64 truncations and 256 flipped bits, in the last checkpoint or its checksum."""
    store, rng = CheckpointManager(tmp_path, keep_last=2, keep_steps=0), random.Random(8)
    for step in (1, 2):
        store.write(step, state(step))
    last = published(tmp_path)[2]
    whole, summed = last.read_bytes(), sidecar(last).read_bytes()
    faults = [whole[: rng.randrange(len(whole))] for _ in range(64)]
    for _ in range(240):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        faults.append(bytes(flipped))
    loaded = 0
    for fault in faults:
        last.write_bytes(fault)
        path, found = read_newest(candidates(tmp_path))
        loaded += found["step"] != 1
        assert path != last
    last.write_bytes(whole)
    for _ in range(16):
        flipped = bytearray(summed)
        flipped[rng.randrange(64)] ^= 1 << rng.randrange(8)
        sidecar(last).write_bytes(flipped)
        loaded += read_newest(candidates(tmp_path))[1]["step"] != 1
    assert loaded == 0
    sidecar(last).write_bytes(summed)
    assert read_newest(candidates(tmp_path))[1]["step"] == 2


def sabotaged(*words, code):
    return run_forked(saboteur.main, *words, code=code)


@pytest.fixture(scope="module")
def unbroken(pictures, tmp_path_factory):  # noqa: F811
    return undisturbed(tmp_path_factory.mktemp("unbroken") / "run", pictures, epochs=1)


@pytest.fixture(scope="module")
def unbroken_of_fcmae(pictures, tmp_path_factory):  # noqa: F811
    return undisturbed(tmp_path_factory.mktemp("fcmae") / "run", pictures, 1, "--method=fcmae")


def undisturbed(folder, pictures, epochs, *more):  # noqa: F811
    flags = [
        "name",
        f"--data_path={pictures}",
        *TINY,
        "--bs=8",
        f"--ep={epochs}",
        "--base_lr=0.01",
        "--picture_every=0",
    ]
    flags += ["--save_every=1", "--log_every=1", *more]
    here(*flags, f"--exp_dir={folder}")
    return folder, flags


@pytest.mark.slow
def test_a_finished_run_keeps_two_checkpoints_and_lists_all(unbroken):
    folder, _ = unbroken
    rows = [json.loads(line) for line in (folder / RECORD).read_text().splitlines()]
    assert rows[-1]["step"] == STEPS
    assert list(published(folder)) == [row["step"] for row in rows[:-3:-1]]


def test_killed_inside_a_save_of_a_run_it_ends_with_the_same_bits(unbroken, tmp_path, times):
    """Row 2 once more, with the command itself."""
    folder, flags = unbroken
    if not times(0, 30):
        pytest.skip("with --repeat_drills; tests/cli/test_train.py kills the command at random moments")
    for i in range(30):
        point = list(saboteur.POINTS)[(i + 4) % len(saboteur.POINTS)]
        words = [*flags, f"--exp_dir={tmp_path / str(i)}"]
        sabotaged(point, 10 if point == "half written" else 2, "kill", *words, code=-signal.SIGKILL)
        here(*words, "--resume=auto")
        assert_same_weights(folder, tmp_path / str(i))


@pytest.mark.slow
def test_a_signal_during_a_save_waits_for_it(pictures, tmp_path, times):  # noqa: F811
    """Row 4: the signal comes when a checkpoint is about to get its name.

    Three epochs: however slow the disk, the second save begins at the end of the first epoch, and the end of the
    second one waits for it. So the signal never finds a run that has taken its last step.
    """
    folder, flags = undisturbed(tmp_path / "whole", pictures, epochs=3)
    for i in range(times(1, 10)):
        run, name = tmp_path / str(i), ("SIGUSR1", "SIGTERM", "SIGINT")[i % 3]
        words = [*flags, f"--exp_dir={run}"]
        done = sabotaged("no name", 2, name, *words, code=75)
        rows = [json.loads(line)["step"] for line in (run / RECORD).read_text().splitlines()]
        left = read(run / CHECKPOINT)["step"]
        # the second save is the one the signal fell in; the step it then finished is the last
        assert rows[-1] == left == int(done.stdout.rsplit("stopped at step ")[1].split()[0])
        assert len(rows) == 3
        here(*words, "--resume=auto")
        assert_same_weights(folder, run)


@pytest.mark.slow
def test_a_second_signal_ends_a_run_that_hangs_in_its_save(unbroken, tmp_path):
    """Row 4: the writer hangs for ever, as on a lost mount."""
    _, flags = unbroken
    sabotaged("no name", 2, "twice", *flags, f"--exp_dir={tmp_path / 'run'}", code=-signal.SIGTERM)
    path, found = read_newest(candidates(tmp_path / "run"))
    assert [path] == list(published(tmp_path / "run").values())
    assert found["step"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("of", ["unbroken", "unbroken_of_fcmae"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(request, tmp_path, of):
    """Row 11: the second save fails, all others succeed."""
    folder, flags = request.getfixturevalue(of)
    done = sabotaged("nothing written", 2, "full once", *flags, f"--exp_dir={tmp_path / 'run'}", code=0)
    told = [line for line in done.stderr.splitlines() if "NOT SAVED" in line]
    assert len(told) == 1
    assert "File too large" in told[0]
    assert f"{tmp_path / 'run' / FOLDER}/step_" in told[0]
    assert "It needs " in told[0]
    assert " MB are free there" in told[0]
    assert_same_weights(folder, tmp_path / "run")


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_with_6_and_keeps_what_it_had(unbroken, tmp_path):
    """Row 11: from the second save on nothing can be written; the run goes on to its end and says so."""
    _, flags = unbroken
    done = sabotaged("nothing written", 2, "full", *flags, f"--exp_dir={tmp_path / 'run'}", code=6)
    assert f"step {STEPS}/{STEPS}" in done.stdout, "no step was given up"
    assert f"spark-fast-train: cannot write {tmp_path / 'run' / FOLDER / f'step_{STEPS:08d}.pth'}" in done.stderr
    assert read_newest(candidates(tmp_path / "run"))[1]["step"] >= 1
    assert not list(tmp_path.rglob("*.partial"))


def refused(capsys, monkeypatch, flags, *words, code=6):
    """The command in this process, refused before step 1; returns what it says."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    assert main([*map(str, flags), *map(str, words)]) == code
    shown = capsys.readouterr()
    assert "step 1/" not in shown.out
    return shown.err


@pytest.fixture
def copied(unbroken, tmp_path):
    folder, flags = unbroken
    shutil.copytree(folder, tmp_path / "run", symlinks=True)
    return tmp_path / "run", [*flags, f"--exp_dir={tmp_path / 'run'}", "--resume=auto"]


def test_where_all_checkpoints_are_bad_nothing_starts(copied, capsys, monkeypatch):
    """Row 9."""
    folder, flags = copied
    for path in published(folder).values():
        path.write_bytes(path.read_bytes()[:-1])
    said = refused(capsys, monkeypatch, flags)
    assert f"no usable checkpoint in {folder / FOLDER}" in said
    assert all(f"{path} is damaged" in said for path in published(folder).values())


@pytest.mark.parametrize("also", [[], [CHECKPOINT]])
def test_where_they_are_gone_nothing_starts(copied, capsys, monkeypatch, also):
    """Row 9."""
    folder, flags = copied
    shutil.rmtree(folder / FOLDER)
    for name in also:
        (folder / name).unlink()
    assert f"{folder} holds a run whose checkpoints are missing" in refused(capsys, monkeypatch, flags)


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small file system; skips where that is not allowed."""
    place = tmp_path / "mounted"
    place.mkdir()

    def mount(*options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip(f"this process may not mount: {done.stderr.decode().strip()}")
        return place

    yield mount
    subprocess.run(["umount", place], capture_output=True)


@pytest.mark.parametrize("resume", [[], ["--resume=auto"]])
def test_a_read_only_folder_starts_nothing(unbroken, mounted, capsys, monkeypatch, resume):
    """Row 9."""
    place = mounted("ro", "size=1g")
    said = refused(capsys, monkeypatch, unbroken[1], f"--exp_dir={place if resume else place / 'run'}", *resume)
    assert "cannot be written: [Errno 30] Read-only file system" in said


def test_a_disk_without_room_for_the_checkpoints_starts_nothing(unbroken, mounted, capsys, monkeypatch):
    """Row 11."""
    folder, flags = unbroken
    size = (folder / CHECKPOINT).stat().st_size
    place = mounted(f"size={2 * size}")
    said = refused(capsys, monkeypatch, flags, f"--exp_dir={place / 'run'}")
    assert f"not enough disk space for checkpoints in {place / 'run'}" in said
    needed = float(said.split(" MB, ")[0].rsplit(" ", 1)[1])
    assert abs(needed - 3 * size / 1e6) < 0.02 * needed, "the estimate is the size"
    assert not list(place.iterdir())


def test_a_folder_in_use_starts_nothing(copied, capsys, monkeypatch):
    folder, flags = copied
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX);"
         "f.write('{\"pid\": 1, \"host\": \"far\"}'); f.flush(); print(flush=True); time.sleep(600)", folder / "other"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        holder.stdout.readline()
        (folder / "other").replace(folder / "run.lock")
        assert 'in use by another run ({"pid": 1, "host": "far"})' in refused(capsys, monkeypatch, flags)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


EDITS = [
    ("--bs=16", "batch_size was 8, is 16"),
    ("--ep=3", "epochs was 1, is 3"),
    ("--base_lr=0.02", "base_lr was 0.01, is 0.02"),
    ("--mask=0.25", "mask_ratio was 0.5, is 0.25"),
    ("--seed=1", "seed was 0, is 1"),
    ("--opt=adamw", "optimizer was 'lamb', is 'adamw'"),
    ("--decoder_width=64", "decoder_width was 32, is 64"),
    ("--input_size=96", "input_size was '64x64', is '96x96'"),
    ("fewer images", "the data had 48 images, now 40"),
    ("other images", "the data are 48 different images"),
    ("another format", "has format 2, this version reads 1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("edit", "difference"), EDITS)
def test_another_run_is_not_gone_on_with(copied, pictures, tmp_path, capsys, monkeypatch, edit, difference):  # noqa: F811
    """Row 7."""
    folder, flags = copied
    code = 6 if edit == "another format" else 2  # a mistake in the settings
    if edit in ("fewer images", "other images"):
        shutil.copytree(pictures, tmp_path / "changed")
        for path in sorted((tmp_path / "changed").rglob("*.JPEG"))[:8]:
            path.unlink() if edit == "fewer images" else path.rename(path.with_stem(f"{path.stem}_b"))
        edit = f"--data_path={tmp_path / 'changed'}"
    if edit == "another format":
        for path in published(folder).values():
            checkpoint.write(path, {**read(path), "format": 2})
        edit = "--log_every=2"
    assert difference in refused(capsys, monkeypatch, flags, edit, code=code)
