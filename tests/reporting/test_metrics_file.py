"""metrics.jsonl: whole lines of valid JSON at any time, and no step twice after a resume."""

import json
import math
import resource
from contextlib import contextmanager

import pytest

from spark_fast.reporting.metrics_file import MetricsFile, line_of


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def written(path, steps, start=0):
    file = MetricsFile(path, start)
    for step in steps:
        file.point({"step": step, "loss": step / 10}, step)
    file.close()


def test_a_line_is_there_as_soon_as_it_is_written(path):
    file = MetricsFile(path, 0)
    for step in (1, 2):
        file.point({"step": step}, step)
        assert rows(path)[-1] == {"step": step}, "readable while the run goes on"
    file.close()


def test_reopened_after_a_checkpoint_it_drops_the_steps_that_will_be_run_again(path):
    written(path, [2, 4, 6, 8])
    written(path, [6], start=5)
    assert [(r["step"], r["loss"]) for r in rows(path)] == [(2, 0.2), (4, 0.4), (6, 0.6)]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_line_of_the_very_step_of_the_checkpoint_is_kept(path):
    written(path, [2, 4])
    written(path, [], start=4)
    assert [r["step"] for r in rows(path)] == [2, 4]


def test_a_fresh_start_begins_with_an_empty_file(path):
    written(path, [2, 4])
    written(path, [])
    assert rows(path) == []


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"{", b'"step"', b"17", b"[1]", b"\0\0\0", b"\xff\xfe"])
def test_a_line_cut_off_by_a_kill_is_dropped(path, torn):
    written(path, [2])
    with path.open("ab") as file:
        file.write(torn)
    written(path, [6], start=5)
    assert [r["step"] for r in rows(path)] == [2, 6]


def test_a_line_that_lost_only_its_end_does_not_swallow_the_next(path):
    written(path, [2, 4])
    path.write_text(path.read_text().rstrip("\n"))
    written(path, [6], start=4)
    assert [r["step"] for r in rows(path)][-1] == 6


def test_what_is_no_number_is_null():
    strict = json.loads(line_of({"a": math.nan, "b": -math.inf, "c": 1.5, "d": "x"}), parse_constant=pytest.fail)
    assert strict == {"a": None, "b": None, "c": 1.5, "d": "x"}


@contextmanager
def files_end_at(size):
    """No file of this process may grow beyond so many bytes: a write that would is cut short, the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_takes_no_half_line_and_is_used_again_when_it_is_not(path):
    file = MetricsFile(path, 0)
    line = len(line_of({"step": 1, "loss": 0.5}))
    for step in range(1, 10):
        row = {"step": step, "loss": 0.5}
        if step in (4, 5):
            told = r"only 7 of \d+ bytes could be written to .*metrics\.jsonl"
            with pytest.raises(OSError, match=told), files_end_at(3 * line + 7):
                file.point(row, step)
        else:
            file.point(row, step)
        assert path.read_text().endswith("}\n")
    file.close()
    assert [r["step"] for r in rows(path)] == [1, 2, 3, 6, 7, 8, 9]
