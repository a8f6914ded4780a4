"""What the operating system says of cores, processes and memory."""

import os
import signal
import subprocess
import sys

import pytest

from spark_fast.operating_system import process_state, usable_cores


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="there is no /proc")  # noqa: PTH110
def test_a_process_runs_is_stopped_or_is_not_there():
    assert process_state(os.getpid()) == "R"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    os.kill(child.pid, signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)  # returns when it has stopped
    assert process_state(child.pid) == "T"
    child.kill()
    child.wait()
    assert process_state(child.pid) == process_state(None) == "?"


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5}, raising=False)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


PARENT = """
import subprocess, sys
from spark_fast.operating_system import peak_resident_bytes
held = b"x" * (500 << 20)
print(peak_resident_bytes(), flush=True)
show = "from spark_fast.operating_system import peak_resident_bytes; print(peak_resident_bytes())"
subprocess.run([sys.executable, "-c", show], check=True)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="there is no /proc")  # noqa: PTH110
def test_the_peak_of_memory_is_of_this_process_alone_not_of_the_one_that_started_it():
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, check=True)
    parent, child = map(int, done.stdout.split())
    assert child < 500 << 20 < parent
