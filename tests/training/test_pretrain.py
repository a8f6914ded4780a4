"""Pre-training from Python: the same as the command, from any thread, and without a trace in the process."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import spark_fast
from spark_fast.checkpoint.file import read
from spark_fast.errors import DataError, MisfitError, SettingsError
from tests.commands import as_it_was

TINY = {"model": "resnet10t", "input_size": 64, "mask_ratio": 0.5, "decoder_width": 32, "pipeline": "synthetic",
        "batch_size": 4, "epochs": 1, "warmup_epochs": 0, "picture_every": 0, "device": "cpu"}  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def few(monkeypatch):
    """Generated images are as many as ImageNet's; a run of three steps is enough here."""
    return {**TINY, "max_steps": 3, "log_every": 2}


@pytest.mark.slow
def test_it_returns_the_folder_and_the_last_figures_and_goes_on_when_asked(few, tmp_path):
    done = spark_fast.pretrain(**few, exp_dir=tmp_path / "run")
    assert done.folder == tmp_path / "run"
    assert done.finished is False
    last = json.loads((done.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert done.metrics["loss"] == last["loss"]
    assert done.metrics["step"] == last["step"] == 3
    again = spark_fast.pretrain(**few, exp_dir=tmp_path / "run", resume="auto")
    assert again.metrics["step"] == 6


def test_afterwards_the_process_is_as_it_was(few, tmp_path, capsys):
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    before = sys.stdout, sys.stderr, handler.stream, signal.getsignal(signal.SIGINT), dict(os.environ), list(sys.path)
    try:
        spark_fast.pretrain(**few, exp_dir=tmp_path / "run")
        after = (
            sys.stdout, sys.stderr, handler.stream, signal.getsignal(signal.SIGINT), dict(os.environ), list(sys.path)
        )  # fmt: skip
    finally:
        logging.getLogger().removeHandler(handler)
    assert after == before
    assert "stopped at step 3" in (tmp_path / "run" / "stdout_backup.txt").read_text()


def test_it_runs_in_a_thread_and_says_once_that_signals_do_not_reach_it(few, tmp_path, caplog):
    found = []
    caplog.set_level(logging.INFO, "spark_fast")
    thread = threading.Thread(target=lambda: found.append(spark_fast.pretrain(**few, exp_dir=tmp_path / "run")))
    thread.start()
    thread.join()
    assert found[0].metrics["step"] == 3
    assert sum("not in the main thread" in message for message in caplog.messages) == 1


def test_the_command_runs_in_a_thread_too(few, tmp_path):
    from spark_fast.train import main

    words = [f"--{name}={value}" for name, value in few.items()]
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["r", f"--exp_dir={tmp_path / 'run'}", *words])))
    with as_it_was():
        thread.start()
        thread.join()
    assert codes == [75]


def test_mistakes_are_exceptions_that_name_the_setting(tmp_path):
    with pytest.raises(TypeError, match=r"'ep' is not a setting: it is --ep on the command line, epochs here"):
        spark_fast.pretrain("x", exp_name="a", ep=3)
    with pytest.raises(TypeError, match=r"'decoder_widht' is not a setting; did you mean decoder_width"):
        spark_fast.pretrain("x", exp_name="a", decoder_widht=8)
    with pytest.raises(SettingsError, match=r"precision must be one of .*'bf16'.*, got 'fp8'"):
        spark_fast.pretrain("x", exp_name="a", precision="fp8")
    with pytest.raises(SettingsError, match=r"epochs must be of type int, got '3'"):
        spark_fast.pretrain("x", exp_name="a", epochs="3")
    with pytest.raises(SettingsError, match=r"the run needs a name"):
        spark_fast.pretrain("x")
    one = {"model": "resnet10t", "input_size": 64, "mask_ratio": 0.75, "batch_size": 1, "decoder_width": 32}
    with pytest.raises(SettingsError, match="one visible patch of one image is too little for a batch norm"):
        spark_fast.pretrain(pipeline="synthetic", exp_dir=tmp_path / "run", device="cpu", **one)
    with pytest.raises(DataError, match="nowhere does not exist"):
        spark_fast.pretrain(tmp_path / "nowhere", exp_dir=tmp_path / "run", device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_importing_changes_nothing_outside():
    code = (
        "import os, sys; before = dict(os.environ), list(sys.path)\n"
        "import spark_fast, spark_fast.pipelines; spark_fast.build_spark; spark_fast.pretrain\n"
        "assert (dict(os.environ), list(sys.path)) == before, os.environ.keys() - before[0].keys()"
    )
    path = os.pathsep.join([str(Path(spark_fast.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.slow
def test_the_result_of_a_step_depends_on_seed_step_and_rank_alone(few, tmp_path):
    torch.manual_seed(123)
    a = spark_fast.pretrain(**few, exp_dir=tmp_path / "a")
    torch.manual_seed(456)
    b = spark_fast.pretrain(**few, exp_dir=tmp_path / "b")
    assert a.metrics["loss"] == b.metrics["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 12])
def test_images_of_any_number_of_channels_are_trained_on_and_resumed_with_the_same_bits(few, tmp_path, channels):
    settings = {
        **few,
        "model": "test_resnet",
        "in_chans": channels,
        "verify": "never",
        "picture_every": 1,
        "log_every": 1,
    }
    whole = spark_fast.pretrain(**settings | {"max_steps": 4}, exp_dir=tmp_path / "whole")
    for _ in range(2):
        parts = spark_fast.pretrain(**settings | {"max_steps": 2}, exp_dir=tmp_path / "parts", resume="auto")
    assert parts.metrics["step"] == whole.metrics["step"] == 4
    a, b = (read(tmp_path / name / "ckpt-last.pth")["model"] for name in ("whole", "parts"))
    assert a["encoder.network.conv1.0.weight"].shape[1] == channels
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    with pytest.raises(MisfitError, match=f"in_chans was {channels}, is 3"):
        spark_fast.pretrain(**settings | {"in_chans": 3}, exp_dir=tmp_path / "parts", resume="auto")

    again = settings | {"in_chans": 5, "init_weight": str(tmp_path / "whole"), "max_steps": 1}
    with pytest.raises(MisfitError, match=rf"It takes images of {channels} channels? \(--in_chans {channels}\)"):
        spark_fast.pretrain(**again, exp_dir=tmp_path / "again")


def test_a_dry_run_tells_the_channels(few, tmp_path, capsys):
    spark_fast.pretrain(
        **{**few, "model": "test_resnet"}, in_chans=12, verify="never", dry_run=True, exp_dir=tmp_path / "a"
    )
    told = capsys.readouterr().out
    assert "4 per step, of 12 channels" in told
    assert "dry run: nothing was written" in told
