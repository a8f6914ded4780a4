"""The Ray driver: on Ray itself, and on a stand-in that runs each task here: all parts, then the merge."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from spark_fast.pipelines.sources.shard_format import read_manifest
from tests.commands import HANG_SECONDS
from tools import convert_ray


class Ray:
    """What the driver uses of Ray."""

    def init(self, **how):
        pass

    def remote(self, **options):
        self.options = options
        return lambda function: SimpleNamespace(remote=lambda *words: function(*words))

    def get(self, results):
        return results


@pytest.fixture
def started(monkeypatch):
    """The commands that are started; with `codes` they end otherwise than well."""
    commands, codes = [], {}

    def run(command, check=False):
        commands.append(command)
        code = codes.get(len(commands), 0)
        if check and code:
            raise subprocess.CalledProcessError(code, command)
        return SimpleNamespace(returncode=code)

    monkeypatch.setitem(sys.modules, "ray", Ray())
    monkeypatch.setattr(subprocess, "run", run)
    return SimpleNamespace(commands=commands, codes=codes)


def test_each_part_is_a_task_and_the_merge_comes_last(started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert_ray.main(["in", "out", "--parts=2", "--cpus=4", "--quality=80"]) == 0
    command = [sys.executable, "-m", "spark_fast.cli.convert"]
    src, dst = str(tmp_path / "in"), str(tmp_path / "out")  # a task may run in another folder, on another node
    parts = [[*command, src, dst, "--quality=80", f"--part={i}/2"] for i in (1, 2)]
    assert started.commands == [*parts, [*command, dst, "--merge"]]
    assert sys.modules["ray"].options == {"num_cpus": 4, "max_retries": 3, "retry_exceptions": True}


def test_a_part_that_fails_is_not_merged(started):
    started.codes[2] = 3
    with pytest.raises(subprocess.CalledProcessError):
        convert_ray.main(["in", "out", "--parts=3"])
    assert len(started.commands) == 2


def test_the_exit_code_is_that_of_the_merge(started):
    started.codes[2] = 6
    assert convert_ray.main(["in", "out", "--parts=1"]) == 6


@pytest.mark.ray
def test_ray_itself_converts_all_parts_and_merges_them(tmp_path):
    """In a process of its own, which starts Ray on this machine and ends it."""
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    words = ["images", "out", "--parts=2", "--cpus=1", "--workers=1", "--images_per_shard=3"]
    done = subprocess.run(
        [sys.executable, convert_ray.__file__, *words], cwd=tmp_path, capture_output=True, text=True,
        timeout=HANG_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.count, len(manifest.shards)) == (6, 2)
