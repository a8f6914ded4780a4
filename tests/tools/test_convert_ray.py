"""The Ray driver on a stand-in of Ray that runs each task here: all parts, then the merge."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

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


def test_each_part_is_a_task_and_the_merge_comes_last(started):
    assert convert_ray.main(["in", "out", "--parts=2", "--cpus=4", "--quality=80"]) == 0
    command = [sys.executable, "-m", "spark_fast.cli.convert"]
    parts = [[*command, "in", "out", "--quality=80", f"--part={i}/2"] for i in (1, 2)]
    assert started.commands == [*parts, [*command, "out", "--merge"]]
    assert sys.modules["ray"].options == {"num_cpus": 4, "max_retries": 3, "retry_exceptions": True}


def test_a_part_that_fails_is_not_merged(started):
    started.codes[2] = 3
    with pytest.raises(subprocess.CalledProcessError):
        convert_ray.main(["in", "out", "--parts=3"])
    assert len(started.commands) == 2


def test_the_exit_code_is_that_of_the_merge(started):
    started.codes[2] = 6
    assert convert_ray.main(["in", "out", "--parts=1"]) == 6
