"""The job file on a stand-in of Slurm: sbatch runs it until it is not queued again, srun starts its tasks here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.tiny_run import TINY, losses, pictures  # noqa: F401
from tests.commands import HANG_SECONDS

JOB = Path(__file__).parents[2] / "tools" / "slurm.sbatch"

SBATCH = """#!/usr/bin/env bash
rm -f requeued
while true; do
    SLURM_JOB_ID=12345 SLURM_JOB_NODELIST=node[1-2] SLURM_NTASKS=2 bash "$@"; code=$?
    [[ -e requeued ]] || exit $code
    rm requeued
done
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> scontrol.log
if [[ $1 == show ]]; then printf 'localhost\\nnode2\\n'; else touch requeued; fi
"""
SRUN = """#!/usr/bin/env bash
echo "$1" >> srun.log; shift
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks[$task]=$!; done
worst=0
for task in "${tasks[@]}"; do wait "$task"; code=$?; ((code > worst)) && worst=$code; done
exit $worst
"""
# tells how it was started, and ends with the next of the codes
PYTHON = """#!/bin/sh
printf '{"rank": "%s", "local": "%s", "world": "%s", "at": "%s:%s", "words": "%s"}\\n' \
    "$RANK" "$LOCAL_RANK" "$WORLD_SIZE" "$MASTER_ADDR" "$MASTER_PORT" "$*" >> "started.$RANK"
exit $(sed -n "$(wc -l < started.$RANK)p" codes)
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """slurm(python, *words): sbatch on the job file, in an empty folder; `python` is a script in place of Python."""
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)

    def sbatch(python, *words):
        for name, script in {"sbatch": SBATCH, "scontrol": SCONTROL, "srun": SRUN, "python": python}.items():
            (tmp_path / "bin" / name).write_text(script)
            (tmp_path / "bin" / name).chmod(0o755)
        path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
        command = ["sbatch", str(JOB), *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)

    return sbatch


def test_it_is_queued_again_while_the_run_is_not_finished(slurm, tmp_path):
    (tmp_path / "codes").write_text("75\n75\n0\n")
    done = slurm(PYTHON, "my run", "--bs=8")
    assert done.returncode == 0, done.stderr
    for rank in "01":
        started = [json.loads(line) for line in (tmp_path / f"started.{rank}").read_text().splitlines()]
        words = "-m spark_fast.train my run --bs=8 --resume auto"
        told = {"rank": rank, "local": rank, "world": "2", "at": "localhost:32345", "words": words}
        assert started == [told] * 3
    assert (tmp_path / "scontrol.log").read_text().count("requeue 12345") == 2
    assert set((tmp_path / "srun.log").read_text().splitlines()) == {"--kill-on-bad-exit=0"}


@pytest.mark.parametrize("code", [2, 3, 4, 5, 6, 137])
def test_a_failure_ends_the_job_with_its_code(slurm, tmp_path, code):
    (tmp_path / "codes").write_text(f"75\n{code}\n")
    assert slurm(PYTHON, "mine").returncode == code
    assert (tmp_path / "scontrol.log").read_text().count("requeue 12345") == 1


def test_slurm_signals_the_ranks_not_this_script_and_may_queue_the_job_again():
    asked = [line.split()[1] for line in JOB.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal=USR1@300", "--open-mode=append"} <= set(asked)


@pytest.mark.drill
def test_real_ranks_take_each_step_once_over_three_jobs(slurm, pictures, tmp_path):  # noqa: F811
    flags = [
        f"--data_path={pictures}",
        *TINY,
        "--bs=8",
        "--ep=2",
        "--log_every=1",
        "--max_steps=5",
        "--picture_every=0",
    ]
    done = slurm(f'#!/bin/sh\nexec {sys.executable} "$@"\n', "mine", *flags)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "output_mine")) == 12
    assert (tmp_path / "scontrol.log").read_text().count("requeue 12345") == 2
