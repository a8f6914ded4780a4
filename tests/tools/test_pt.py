"""The launcher in a checkout whose .venv holds a stand-in for Python that tells what it was called with."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import HANG_SECONDS

LAUNCHER = Path(__file__).parents[2] / "tools" / "pt.sh"


@pytest.fixture
def launch(tmp_path):
    checkout = tmp_path / "a checkout"
    (checkout / "tools").mkdir(parents=True)
    (checkout / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(LAUNCHER, checkout / "tools")
    python = checkout / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit ${CODE:-0}\n')
    python.chmod(0o755)

    def run(*words, code=0):
        return subprocess.run(
            ["bash", str(checkout / "tools" / "pt.sh"), *words],
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            env={**os.environ, "CODE": str(code)},
        )

    return run


def torchrun(nodes="1", processes="1", rank="0", address="127.0.0.1", port="30001"):
    return [
        *("-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc_per_node={processes}"),
        *(f"--node_rank={rank}", f"--master_addr={address}", f"--master_port={port}"),
        *("-m", "spark_fast.train"),
    ]


def test_defaults_are_one_process_on_this_machine(launch):
    assert launch("mine", "--bs=512").stdout.splitlines() == [*torchrun(), "mine", "--bs=512"]


@pytest.mark.parametrize("style", ["--{}={}", "--{} {}"])
def test_launcher_flags_reach_torchrun_and_the_others_the_trainer_in_order(launch, style):
    flags = {
        "num_nodes": "4",
        "ngpu_per_node": "8",
        "node_rank": "3",
        "master_address": "10.0.0.1",
        "master_port": "29500",
    }
    words = [word for pair in flags.items() for word in style.format(*pair).split()]
    told = launch("mine", "--model", "res50", *words, "--data_path=/my data").stdout.splitlines()
    trainer = ["mine", "--model", "res50", "--data_path=/my data"]
    assert told == [*torchrun("4", "8", "3", "10.0.0.1", "29500"), *trainer]


def test_no_nodes_is_one_plain_process(launch):
    told = launch("mine", "--num_nodes=0", "--ep=1").stdout.splitlines()
    assert told == ["-m", "spark_fast.train", "mine", "--ep=1"]


def test_a_misspelt_launcher_flag_is_left_to_the_trainer_to_report(launch):
    assert launch("mine", "--num_node=2").stdout.splitlines()[-2:] == ["mine", "--num_node=2"]


def test_exit_code_is_that_of_the_training(launch):
    assert launch("mine", code=75).returncode == 75


@pytest.mark.parametrize("words", [(), ("--num_nodes=1",)])
def test_without_a_name_it_shows_the_usage(launch, words):
    result = launch(*words)
    assert result.returncode == 2
    assert "<experiment_name>" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("words", [("--num_nodes=two",), ("--node_rank",), ("--master_address=",)])
def test_a_launcher_flag_without_a_usable_value_is_named(launch, words):
    result = launch("mine", *words)
    assert result.returncode == 2
    assert words[0].partition("=")[0] in result.stderr


@pytest.mark.slow
def test_the_real_trainer_is_found_without_torchrun():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", str(LAUNCHER), "mine", "--num_nodes=0", "--mask=0.7", "--bs=64", "--print_config"],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        env={**os.environ, "PATH": path},
    )
    assert result.returncode == 0, result.stderr
    assert "mask_ratio = 0.7" in result.stdout
    assert "batch_size = 64" in result.stdout
