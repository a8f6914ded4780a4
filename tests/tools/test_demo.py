import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import HANG_SECONDS

pytestmark = pytest.mark.slow

DEMO = Path(__file__).parents[2] / "tools" / "demo.py"
PICTURES = ("--pictures", "16", "--picture_size", "64")
TRAINING = ("--input_size", "64", "--batch_size", "8", "--decoder_width", "32", "--log_every", "1")


def command(out, *more):
    return [sys.executable, str(DEMO), "--out", str(out), *PICTURES, *TRAINING, *more]


def run(out, *more):
    return subprocess.run(command(out, *more), capture_output=True, text=True, timeout=HANG_SECONDS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, run(out, "--epochs", "2")


def test_demo_trains_and_says_what_came_of_it(finished):
    out, result = finished
    assert result.returncode == 0, result.stderr
    for told in ("loss ", "images/s", "of the time waiting for data", "epoch_0002.png", "tensorboard"):
        assert told in result.stdout
    assert (out / "run" / "resnet18_timm.safetensors").is_file()
    assert (out / "run" / "reconstruction" / "epoch_0002.png").is_file()


def test_a_second_run_says_it_was_complete_and_tells_the_same(finished):
    out, first = finished
    metrics = (out / "run" / "metrics.jsonl").read_text()
    second = run(out, "--epochs", "2")
    assert second.returncode == 0, second.stderr
    assert "already complete" in second.stdout
    assert second.stdout.split("== 4.")[1] == first.stdout.split("== 4.")[1]
    assert (out / "run" / "metrics.jsonl").read_text() == metrics


def test_the_trainers_exit_code_and_words_are_passed_on(finished):
    out, _ = finished
    result = run(out, "--epochs", "2", "--mask", "1.5")
    assert result.returncode == 2
    assert "mask_ratio" in result.stderr


def test_stopped_it_saves_and_the_same_command_goes_on(finished, tmp_path):
    shards = ("--data_path", str(finished[0] / "images"), "--epochs", "100000", "--picture_every", "0")
    metrics = tmp_path / "out" / "run" / "metrics.jsonl"

    def stopped_after(lines, number):
        process = subprocess.Popen(command(tmp_path / "out", *shards), stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + HANG_SECONDS
        while not metrics.exists() or metrics.read_text().count("\n") < lines:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        os.kill(process.pid, number)
        _, told = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 75
        assert "the same command continues" in told
        return metrics.read_text().splitlines()

    first = stopped_after(2, signal.SIGINT)
    both = stopped_after(len(first) + 2, signal.SIGTERM)
    assert both[: len(first)] == first
    assert [json.loads(line)["step"] for line in both] == list(range(1, len(both) + 1))
