"""The run folder: enough in it to repeat the run, and never another run's."""

import json
import logging
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import spark_fast
from spark_fast.errors import CheckpointError, SettingsError
from spark_fast.run.lock import RunLock
from spark_fast.run.run_folder import CHECKPOINT, describe, open_run_folder, refuse_another_run
from spark_fast.training.settings import parse


def open_folder(chosen, lock, pictures=""):
    if not chosen.run.resume:
        refuse_another_run(chosen.folder)
    head = describe(chosen.run.exp_name, chosen.to_dict())
    return open_run_folder(chosen.folder, lock, chosen.to_toml(), head, pictures)


@contextmanager
def opened(chosen):
    """The run folder, with this process's streams and log handlers as they were afterwards."""
    root, lock = logging.getLogger(), RunLock(chosen.folder)
    before = sys.stdout, sys.stderr, root.handlers
    root.handlers = [logging.StreamHandler(sys.stderr)]
    try:
        yield open_folder(chosen, lock, "reconstruction")
    finally:
        sys.stdout, sys.stderr, root.handlers = before
        lock.release()


def settings(folder, *words):
    return parse(["name", f"--exp_dir={folder}", "--data_path=images", *words])


def test_the_head_of_the_log_says_how_to_repeat_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["spark-fast-train", "name", "--data_path=a b"])
    chosen = settings(tmp_path / "run", "--bs=64")
    with opened(chosen):
        pass
    (line,) = (tmp_path / "run" / "log.txt").read_text().splitlines()
    head = json.loads(line)
    assert re.fullmatch(r"[0-9a-f]{40}|\[unknown\]", head["git_commit_id"])
    assert head["cmd"] == "spark-fast-train name '--data_path=a b'"
    assert head["versions"]["torch"] == torch.__version__
    assert head["versions"]["spark_fast"] == spark_fast.__version__
    assert {"python", "torchvision", "timm", "numpy"} <= set(head["versions"])
    assert head["settings"] == json.loads(json.dumps(chosen.to_dict()))
    assert head["name"] == "name"


def test_the_kept_configuration_is_the_runs_own(tmp_path):
    chosen = settings(tmp_path / "run", "--bs=64", "--sbn=0")
    with opened(chosen) as folder:
        assert folder == tmp_path / "run"
    assert parse([f"--config={folder / 'config.toml'}"]) == chosen
    assert (folder / "reconstruction").is_dir()


def test_a_folder_with_a_checkpoint_is_refused_unless_it_is_resumed(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / CHECKPOINT).write_bytes(b"earlier")
    with pytest.raises(SettingsError, match=f"{folder} holds a run already: continue it with --resume auto"):
        open_folder(settings(folder), RunLock(folder))
    assert [p.name for p in folder.iterdir()] == [CHECKPOINT], "nothing was written"
    with opened(settings(folder, "--resume=auto")):
        assert (folder / CHECKPOINT).read_bytes() == b"earlier"


def test_a_resumed_run_adds_to_the_log(tmp_path):
    for words in ([], ["--resume=auto"]):
        with opened(settings(tmp_path / "run", *words)):
            pass
    heads = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert [h["settings"]["run"]["resume"] for h in heads] == ["", "auto"]


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, inside):
    (tmp_path / "file").write_text("no folder")
    place = tmp_path / "file" / inside
    with pytest.raises(CheckpointError, match=f"the run folder {place} cannot be written"):
        open_folder(settings(place), RunLock(place))
    assert (tmp_path / "file").read_text() == "no folder"


def test_everything_printed_is_copied_and_still_printed(tmp_path, capsys):
    with opened(settings(tmp_path / "run")) as folder:
        print("to stdout")
        print("to stderr", file=sys.stderr)
        logging.getLogger("spark_fast").warning("a warning")
        assert sys.stdout.isatty() is False
        assert sys.stdout.encoding, "it is still a stream"
    shown = capsys.readouterr()
    assert (folder / "stdout_backup.txt").read_text() == shown.out == "to stdout\n"
    assert (folder / "stderr_backup.txt").read_text() == shown.err == "to stderr\na warning\n"


def test_a_description_is_plain_json():
    assert json.loads(json.dumps(describe("x", settings("x").to_dict())))["machine"]["cpus"] >= 1


def test_a_copy_that_cannot_be_written_is_given_up_and_told_once(tmp_path, capsys):
    with opened(settings(tmp_path / "run")):
        sys.stdout._file.close()
        sys.stdout._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
        print("first")
        print("second")
    shown = capsys.readouterr().out
    assert shown.startswith(
        f"what is printed is no longer copied to {tmp_path / 'run' / 'stdout_backup.txt'}: [Errno 28]"
    )
    assert shown.endswith("first\nsecond\n")
    assert shown.count("no longer copied") == 1


def test_a_folder_in_use_is_left_alone(tmp_path):
    with opened(settings(tmp_path / "run")) as folder:
        before = sorted(folder.rglob("*"))
        with pytest.raises(CheckpointError, match=f"{folder} is in use by another run"):
            open_folder(settings(folder), RunLock(folder))
        assert sorted(folder.rglob("*")) == before
