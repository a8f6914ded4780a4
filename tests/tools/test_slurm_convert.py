"""The array job of the converter on a stand-in of Slurm: sbatch runs its tasks here, then what depends on them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from spark_fast.pipelines.sources.shard_format import read_manifest
from tests.commands import HANG_SECONDS

JOB = Path(__file__).parents[2] / "tools" / "convert.sbatch"
SBATCH = """#!/usr/bin/env bash
echo "$@" >> sbatch.log
case $1 in
    --array=1-*) tasks=${1#--array=1-}; shift ;;
    --dependency=*) shift 2; printf '%s\\n' "$@" > waiting; exit 0 ;;
esac
export SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_COUNT=$tasks
for task in $(seq "$tasks"); do SLURM_ARRAY_TASK_ID=$task bash "$@" || exit $?; done
mapfile -t words < waiting
bash "${words[@]}"
"""


REAL = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
TELLS = """#!/bin/sh
echo "$@" >> python.log
exit $(sed -n "$(wc -l < python.log)p" codes)
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """slurm(python, *words): sbatch with these words, in an empty folder; `python` is a script in place of Python."""
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PATH": os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])}

    def sbatch(python, *words):
        for name, script in {"sbatch": SBATCH, "python": python}.items():
            (tmp_path / "bin" / name).write_text(script)
            (tmp_path / "bin" / name).chmod(0o755)
        command = ["sbatch", *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)

    return sbatch


def test_each_task_converts_its_part_and_the_merge_waits_for_all(slurm, tmp_path):
    (tmp_path / "codes").write_text("0\n" * 4)
    done = slurm(TELLS, "--array=1-3", JOB, "my images", "out", "--workers=1")
    assert done.returncode == 0, done.stderr
    command = "-m spark_fast.cli.convert"
    parts = [f"{command} my images out --workers=1 --part {i}/3" for i in (1, 2, 3)]
    assert (tmp_path / "python.log").read_text().splitlines() == [*parts, f"{command} out --merge --verify"]
    queued = (tmp_path / "sbatch.log").read_text().splitlines()[1:]
    assert queued == [f"--dependency=afterok:77 --kill-on-invalid-dep=yes {JOB} --merge out"]


def test_a_part_that_fails_is_not_merged(slurm, tmp_path):
    (tmp_path / "codes").write_text("0\n3\n")
    assert slurm(TELLS, "--array=1-2", JOB, "in", "out").returncode == 3
    assert "--merge" not in (tmp_path / "python.log").read_text()


@pytest.mark.slow
def test_real_parts_become_one_conversion(slurm, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(6):
        Image.new("RGB", (40, 40), (40 * i, 90, 10)).save(tmp_path / "in" / f"{i}.jpg")
    done = slurm(REAL, "--array=1-2", JOB, "in", "out", "--images_per_shard=3", "--workers=1")
    assert done.returncode == 0, done.stderr
    assert "verified: every shard" in done.stdout
    folder = next(path.parent for path in (tmp_path / "out").rglob("manifest.json"))
    assert read_manifest(folder).count == 6
