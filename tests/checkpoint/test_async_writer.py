"""Saving in the background: one write in flight, put off rather than waited for, and no error lost."""

import threading

import pytest

from spark_fast.checkpoint import async_writer as module
from spark_fast.checkpoint.async_writer import AsyncWriter
from spark_fast.errors import CheckpointError


def save(saver, step, write):
    saver.begin(step)
    saver.submit(write)


def test_steps_decide_and_a_resumed_run_keeps_the_same_steps():
    saver = AsyncWriter(5, 0, begun=7)
    assert [s for s in range(8, 13) if saver.due(s)] == [10, 11, 12], "until it is done"
    save(saver, 10, lambda: None)
    saver.wait()
    assert [s for s in range(11, 17) if saver.due(s)] == [15, 16]


def test_minutes_decide(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    saver = AsyncWriter(0, 60, begun=0)
    now[0] = 59.0
    assert not saver.due(1)
    now[0] = 60.0
    assert saver.due(2)
    save(saver, 2, lambda: None)
    saver.wait()
    assert not saver.due(3)


def test_nothing_is_due_where_nothing_is_asked():
    assert not any(AsyncWriter(0, 0, begun=0).due(step) for step in range(10))


def test_while_the_disk_is_busy_a_save_is_put_off_and_no_step_waits():
    saver, free, written = AsyncWriter(1, 0, begun=0), threading.Event(), []
    save(saver, 1, lambda: (free.wait(), written.append(1)))
    assert not any(saver.due(step) for step in range(2, 100)), "98 steps went by while the disk hung"
    assert written == []
    free.set()
    saver.wait()
    assert saver.due(100)
    assert written == [1]


def test_what_must_be_saved_waits_for_the_write_before_it():
    saver, free, written = AsyncWriter(0, 0, begun=0), threading.Event(), []
    save(saver, 1, lambda: (free.wait(), written.append(1)))
    threading.Timer(0.05, free.set).start()
    saver.begin(2)
    assert written == [1]
    saver.submit(lambda: written.append(2))
    saver.finish()
    assert written == [1, 2]


def failing(times, written):
    left = [times]

    def write():
        if left[0]:
            left[0] -= 1
            raise CheckpointError("cannot write here: the disk is full")
        written.append("whole")

    return write


def test_a_failure_is_told_at_once_and_tried_again_at_the_end(caplog):
    saver, written = AsyncWriter(1, 0, begun=0), []
    save(saver, 3, failing(1, written))
    saver.wait()
    (message,) = caplog.messages
    assert message.startswith("NOT SAVED at step 3: cannot write here: the disk is full. Training continues")
    assert saver.due(4), "tried again at the next save"
    saver.finish()
    assert written == ["whole"]
    saver.finish()
    assert written == ["whole"]


@pytest.mark.parametrize("error", [CheckpointError("full"), MemoryError("none left"), ValueError("a mistake of ours")])
def test_what_stays_broken_is_raised_at_the_end(error):
    def write():
        raise error

    saver = AsyncWriter(1, 0, begun=0)
    save(saver, 3, write)
    with pytest.raises(type(error), match=str(error)):
        saver.finish()


def test_a_failed_save_is_forgotten_when_a_later_one_succeeds():
    saver, written = AsyncWriter(1, 0, begun=0), []
    save(saver, 1, failing(9, written))
    save(saver, 2, lambda: written.append("later"))
    saver.finish()
    assert written == ["later"]
