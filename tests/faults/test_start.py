"""Row 25: what is wrong with a machine is found at the start, and the message says what to set."""

import os
import socket
import subprocess
import sys

import pytest

from spark_fast.cli.train import main
from spark_fast.commands import command
from tests.cli.tiny_run import pictures  # noqa: F401
from tests.commands import HANG_SECONDS
from tests.faults.test_run import flags_of
from tests.processes import run_forked


def test_no_gpu(pictures, tmp_path):  # noqa: F811
    done = run_forked(main, *flags_of(pictures, 1, "--device=cuda", f"--exp_dir={tmp_path / 'run'}"), code=2,
                 env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    assert "--device cuda: torch sees no GPU here" in done.stderr
    assert not (tmp_path / "run").exists()


def main_without(words):
    package, *flags = words
    sys.modules[package] = None
    return main(flags)


@pytest.mark.parametrize(
    ("pipeline", "package", "code"),
    [("ffcv", "ffcv", 3), ("dali", "nvidia.dali", 2)],  # FFCV misses its .beton first
)
def test_a_decoder_that_is_not_installed(pictures, tmp_path, pipeline, package, code):  # noqa: F811
    words = flags_of(pictures, 1, f"--pipeline={pipeline}", f"--exp_dir={tmp_path / 'run'}")
    done = run_forked(main_without, package, *words, code=code)
    assert "pip install" in done.stderr or f"{command('convert')} SRC DST" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use(pictures, tmp_path):  # noqa: F811
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {
            **os.environ,
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        done = run_forked(main, *flags_of(pictures, 1, f"--exp_dir={tmp_path / 'run'}"), code=2, env=environment)
    assert f"the ranks cannot meet at localhost:{port}" in done.stderr
    assert "--standalone" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param(0, marks=pytest.mark.drill), 1])
@pytest.mark.parametrize("limit", ["ulimit -n 128", "mount -t tmpfs -o size=64k tmpfs /dev/shm"])
def test_what_others_stumble_over_is_not_needed(pictures, tmp_path, limit, processes):  # noqa: F811
    """Few open files, and next to no /dev/shm: nothing to be set, as neither is used, by worker processes either."""
    flags = flags_of(pictures, 1, f"--exp_dir={tmp_path / 'run'}", f"--worker_processes={processes}")
    words = [sys.executable, "-m", "spark_fast.train", *flags]
    isolated = ["unshare", "--mount", "bash", "-c", f'{limit} && exec "$@"', "limited", *map(str, words)]
    done = subprocess.run(isolated, capture_output=True, text=True, timeout=HANG_SECONDS)
    if "unshare failed" in done.stderr or "permission denied" in done.stderr:
        pytest.skip(f"this process may not: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
