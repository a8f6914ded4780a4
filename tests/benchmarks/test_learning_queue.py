"""Runs are kept as they are finished, and a kill costs what was under way."""

import json
import subprocess
import sys

import pytest

from tests.benchmarks.test_device_report import BENCHMARKS
from tests.benchmarks.test_learning import more_pictures, pictures  # noqa: F401
from tests.processes import HANG_SECONDS


@pytest.fixture
def queue():
    import learning_queue

    return learning_queue


def test_a_line_that_a_kill_cut_short_is_left_out_and_written_anew(queue, tmp_path):
    path = tmp_path / "runs.jsonl"
    record = queue.Record(path, {"batch": 8})
    record.add("a", {"top1": 1.0})
    path.write_text(path.read_text() + '{"key": "b", "to')
    assert set(queue.read_rows(path)) == {"settings", "a"}
    again = queue.Record(path, {"batch": 8})
    again.add("b", {"top1": 2.0})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["settings", "a", "b"]
    with pytest.raises(SystemExit, match="other settings"):
        queue.Record(path, {"batch": 4})


def jobs_of(queue, *keys):
    return [queue.Job(key, "", None, {}) for key in keys]


def test_runs_follow_the_order_as_it_is_when_each_ends(queue):
    done = []

    def ready():
        first = jobs_of(queue, "a", "b") if "a" not in done else jobs_of(queue, "c", "b")
        return [job for job in first if job.key not in done]

    for job, row in queue.run_ready(ready, lambda job: {"top1": 1.0}, processes=1):
        assert set(row) == {"top1", "seconds"}
        done.append(job.key)
    assert done == ["a", "c", "b"], "what a made possible comes before b"


def test_nothing_is_begun_when_the_time_is_up(queue):
    assert list(queue.run_ready(lambda: jobs_of(queue, "a"), lambda job: {}, processes=1, seconds=0.0)) == []


@pytest.mark.drill
def test_processes_end_with_the_command_that_was_killed(queue, more_pictures, tmp_path):  # noqa: F811
    words = ["--form", "smoke", "--parts", "evidence", "--processes", "2", "--data", str(more_pictures)]
    command = [sys.executable, str(BENCHMARKS / "learning.py"), *words, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert any(" runs  " in line for line in process.stdout), "a run is finished, and others are under way"
    process.kill()
    process.communicate(timeout=HANG_SECONDS)  # the pipe closes when the last process that has it is gone
    assert len(queue.read_rows(tmp_path / "out" / "runs.jsonl")) >= 2
