"""How many processes the threads are spread over."""

from __future__ import annotations

import os

import pytest

from spark_fast.errors import SettingsError
from spark_fast.pipelines.backends.workers.filling import choose_processes


@pytest.mark.parametrize(
    ("threads", "cores", "processes"),
    [(1, 64, 0), (2, 64, 0), (8, 2, 0), (3, 8, 3), (8, 4, 4), (8, 16, 8), (64, 64, 16)],
)
def test_few_threads_stay_here_and_many_have_processes_of_their_own(threads, cores, processes):
    found, why = choose_processes("auto", threads, cores)
    assert found == processes
    assert f"{threads} threads on {cores} cores" in why


@pytest.mark.parametrize(("threads", "cores", "processes"), [(1, 64, 0), (2, 1, 0), (2, 2, 2), (3, 8, 3)])
def test_where_decoding_is_python_two_threads_have_processes(threads, cores, processes):
    assert choose_processes("auto", threads, cores, in_python=True)[0] == processes


def test_what_is_asked_for_is_taken_but_no_process_without_a_thread():
    assert choose_processes(0, 16, 16) == (0, "as asked")
    assert choose_processes(3, 16, 1) == (3, "as asked")
    assert choose_processes(8, 2, 16) == (2, "as asked")


def test_without_memory_that_needs_no_name_there_are_none(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert choose_processes("auto", 16, 16)[0] == 0
    with pytest.raises(SettingsError, match="worker processes need Linux"):
        choose_processes(2, 16, 16)
