"""The checkpoints of a run folder: published late, pruned to the number asked for, and never silently gone."""

import json
import shutil
from collections import namedtuple

import pytest
import torch

from spark_fast.checkpoint.file import read
from spark_fast.checkpoint.manager import (
    CHECKPOINT,
    FOLDER,
    RECORD,
    CheckpointManager,
    candidates,
    check_space,
    published,
)
from spark_fast.checkpoint.validate_file import check_sha256, sidecar
from spark_fast.errors import CheckpointError


def store(folder, keep_last=2, keep_steps=0):
    return CheckpointManager(folder, keep_last=keep_last, keep_steps=keep_steps)


def content(step):
    return {"step": step, "model": {"a": torch.full((4,), float(step))}}


def names(folder):
    return sorted(p.name for p in (folder / FOLDER).iterdir())


def test_a_save_is_a_file_its_checksum_a_link_and_a_line(tmp_path):
    path = store(tmp_path).write(7, content(7))
    assert names(tmp_path) == ["step_00000007.pth", "step_00000007.pth.sha256"]
    assert check_sha256(tmp_path / CHECKPOINT)
    assert (tmp_path / CHECKPOINT).resolve() == path.resolve()
    assert read(tmp_path / CHECKPOINT)["step"] == 7
    row = json.loads((tmp_path / RECORD).read_text())
    assert row == {"step": 7, "file": path.name, "bytes": path.stat().st_size, "sha256": sidecar(path).read_text()[:64]}


def test_a_run_folder_may_be_moved_and_its_last_checkpoint_copied_alone(tmp_path):
    (tmp_path / "a").mkdir()
    store(tmp_path / "a").write(7, content(7))
    (tmp_path / "a").rename(tmp_path / "b")
    assert read(tmp_path / "b" / CHECKPOINT)["step"] == 7
    shutil.copy(tmp_path / "b" / CHECKPOINT, tmp_path / "alone.pth")
    assert read(tmp_path / "alone.pth")["step"] == 7


@pytest.mark.parametrize(
    ("keep_last", "keep_steps", "left"),
    [(2, 0, [9, 8]), (3, 0, [9, 8, 7]), (20, 0, list(range(9, 0, -1))), (2, 4, [9, 8, 4]), (2, 3, [9, 8, 6, 3])],
)
def test_the_newest_stay_and_those_kept_for_good(tmp_path, keep_last, keep_steps, left):
    for step in range(1, 10):
        store(tmp_path, keep_last, keep_steps).write(step, content(step))
        assert len(published(tmp_path)) >= min(2, step)
    assert list(published(tmp_path)) == left
    assert len(names(tmp_path)) == 2 * len(left), "a checksum for each and no other"


def test_later_checkpoints_of_a_course_that_was_left_go_and_are_told_before(tmp_path, caplog):
    for step in (1, 2, 3):
        store(tmp_path, 3).write(step, content(step))
    store(tmp_path, 3).clean(begun=1)
    assert caplog.messages == ["resuming from step 1: the first save will remove step_00000003.pth, step_00000002.pth"]
    assert read(tmp_path / CHECKPOINT)["step"] == 1
    assert list(published(tmp_path)) == [3, 2, 1]
    store(tmp_path, 3).write(2, {**content(2), "course": "new"})
    assert list(published(tmp_path)) == [2, 1]
    assert read(published(tmp_path)[2])["course"] == "new"


def test_what_a_killed_run_left_is_named_and_removed_and_nothing_else(tmp_path, caplog):
    store(tmp_path).write(1, content(1))
    before = sorted(tmp_path.rglob("*"))
    left = [tmp_path / FOLDER / n for n in ("step_00000002.pth.partial", "step_00000002.pth.sha256")]
    left += [tmp_path / f"{CHECKPOINT}.partial", tmp_path / "resnet50_timm.safetensors.partial"]
    for path in left:
        path.write_bytes(b"half")
    store(tmp_path).clean(begun=1)
    assert sorted(tmp_path.rglob("*")) == before
    assert {m.split()[1].rstrip(",") for m in caplog.messages} == {str(p) for p in left}


def test_the_newest_come_first_and_an_older_versions_file_last(tmp_path):
    assert candidates(tmp_path) == []
    (tmp_path / CHECKPOINT).write_bytes(b"older version")
    assert candidates(tmp_path) == [tmp_path / CHECKPOINT]
    (tmp_path / FOLDER).mkdir()
    for step in (9, 10):
        (tmp_path / FOLDER / f"step_{step:08d}.pth").touch()
    assert candidates(tmp_path) == [*published(tmp_path).values(), tmp_path / CHECKPOINT]


@pytest.mark.parametrize("gone", [["step"], ["step", CHECKPOINT], ["step", RECORD]])
def test_checkpoints_that_are_gone_are_no_fresh_start(tmp_path, gone):
    store(tmp_path).write(1, content(1))
    for name in gone:
        for path in [tmp_path / name] if name != "step" else (tmp_path / FOLDER).glob("*"):
            path.unlink()
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds a run whose checkpoints are missing"):
        candidates(tmp_path)


Usage = namedtuple("Usage", "free")


@pytest.mark.parametrize(("there", "keep_last", "needed"), [(0, 2, 3), (0, 3, 4), (1, 2, 2), (2, 2, 1), (5, 2, 1)])
def test_room_is_needed_for_those_kept_and_the_one_being_written(tmp_path, monkeypatch, there, keep_last, needed):
    for step in range(there):
        store(tmp_path, keep_last=9).write(step + 1, content(step))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(needed * 10**6))
    check_space(tmp_path, 10**6, keep_last)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(needed * 10**6 - 1))
    with pytest.raises(
        CheckpointError, match=rf"{needed} more of 1.0 MB need {needed}.0 MB, .* MB are free at {tmp_path}"
    ):
        check_space(tmp_path, 10**6, keep_last)


def test_the_room_of_a_folder_that_is_not_there_is_that_of_the_one_above(tmp_path):
    check_space(tmp_path / "not" / "there", 1, 2)
    with pytest.raises(CheckpointError, match=f"free at {tmp_path}$"):
        check_space(tmp_path / "not" / "there", 10**15, 2)
