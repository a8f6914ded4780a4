"""A trace of a few steps, written once, while training goes on; and what is said when there is none."""

import gzip
import json

import pytest
import torch

from spark_fast.reporting.profiler import Profile

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def run(folder, steps, begun=0):
    profile = Profile(folder, CPU, begun)
    for _ in range(steps):
        torch.ones(8, 8) @ torch.ones(8, 8)
        profile.advance()
    profile.close()


def products(path):
    with gzip.open(path, "rt") as file:
        return sum(e.get("name") == "aten::mm" for e in json.load(file)["traceEvents"])


def test_steps_5_to_8_of_this_process_are_recorded_once(tmp_path, capfd):
    run(tmp_path, 20, begun=100)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps_105-108.json.gz"
    assert products(path) == 4
    told = capfd.readouterr().out
    assert f"profile of steps 105 to 108: {path}; open it at https://ui.perfetto.dev" in told


def test_of_a_run_that_ends_meanwhile_what_there_is_is_written(tmp_path):
    run(tmp_path, 6)
    (path,) = (tmp_path / "profile").iterdir()
    assert (path.name, products(path)) == ("steps_5-6.json.gz", 2)


@pytest.mark.parametrize("steps", [0, 3, 4])
def test_a_run_too_short_says_so(tmp_path, caplog, steps):
    run(tmp_path, steps)
    assert f"the run ended after {steps} steps, and recording begins at step 5" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file")
    run(tmp_path, 10)
    assert "cannot be written" in caplog.text


def test_without_a_folder_nothing_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(None, 10)
    assert list(tmp_path.iterdir()) == []
