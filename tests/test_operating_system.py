"""What the operating system says of cores, processes and memory."""

import os
import signal
import subprocess
import sys

import pytest

from spark_fast.operating_system import peak_resident_bytes, process_state, usable_cores


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


SHOW = "from spark_fast.operating_system import peak_resident_bytes; print(peak_resident_bytes())"


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="there is no /proc")  # noqa: PTH110
def test_the_peak_of_memory_is_of_this_process_alone_not_of_the_one_that_started_it():
    before = peak_resident_bytes()
    held = b"x" * (before + (100 << 20))
    assert peak_resident_bytes() > before + len(held) // 2
    child = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    assert int(child.stdout) < len(held)
