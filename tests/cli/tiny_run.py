"""Runs of the training command that take seconds: started as a user does, in this process, or under torchrun."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from spark_fast.cli.train import main
from tests.commands import HANG_SECONDS, run_here

TINY = [
    "--model=resnet10t",
    "--input_size=64",
    "--mask=0.5",
    "--decoder_width=32",
    "--workers=2",
    "--threads=1",
    "--wp_ep=1",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """48 small JPEGs in two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(48):
        place = folder / "train" / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((100, 80)).save(place / f"{i:03d}.JPEG", quality=90)
    return folder


def command(*words):
    return [sys.executable, "-m", "spark_fast.train", *map(str, words)]


def train(*words, code=0, **kwargs):
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=HANG_SECONDS, **kwargs)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def here(*words, code=0):
    return run_here(main, *words, code=code)


def weights(folder):
    return torch.load(folder / "ckpt-last.pth", weights_only=True)


def assert_same_weights(a, b):
    state, other = weights(a), weights(b)
    for part in ("model", "optimizer"):
        one, two = io.BytesIO(), io.BytesIO()
        torch.save(state[part], one), torch.save(other[part], two)
        assert one.getvalue() == two.getvalue(), f"{part} differs to the bit"
    assert state["step"] == other["step"]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def torchrun(*words, ranks=2, restarts=0, code=0):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launcher.append(f"--max-restarts={restarts}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "-m", "spark_fast.train", *map(str, words)],
        capture_output=True, text=True, timeout=HANG_SECONDS, env=environment,
    )  # fmt: skip
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    assert "strides" not in done.stderr, "a warning of DDP"
    return done
