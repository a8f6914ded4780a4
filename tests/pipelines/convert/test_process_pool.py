"""Jobs in this process and in several. Processes that die, hang or raise: `tests/faults/test_converter.py`."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from spark_fast.pipelines.convert.process_pool import Advance, run_jobs


def write_pid(path: Path, advance: Advance) -> None:
    """A job: leave a file with the number of the process, as 3 images of 10 bytes."""
    path.write_text(str(os.getpid()))
    for _ in range(3):
        advance(1, 10)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_done_once_and_its_progress_arrives(tmp_path, workers):
    jobs, done = [tmp_path / str(i) for i in range(5)], []
    run_jobs(write_pid, jobs, workers, lambda images, size: done.append((images, size)), lambda job, k: f"{k} of {job}")
    assert [sum(column) for column in zip(*done, strict=True)] == [15, 150]
    pids = {int(job.read_text()) for job in jobs}
    assert (pids == {os.getpid()}) == (workers == 1)
    assert len(pids) <= workers
    assert not multiprocessing.active_children()


def test_in_one_process_the_first_mistake_ends_the_rest(tmp_path):
    def fail_at_2(job: int, advance: Advance) -> None:
        advance(1, job)
        if job == 2:
            raise ZeroDivisionError("job 2")

    seen = []
    with pytest.raises(ZeroDivisionError, match="job 2"):
        run_jobs(fail_at_2, range(5), 1, lambda _, size: seen.append(size), str)
    assert seen == [0, 1, 2]
