"""One run to a folder, and the one that holds it is named."""

import json
import os
import platform
import signal
import subprocess
import sys

import pytest

from spark_fast.errors import CheckpointError
from spark_fast.run.lock import LOCK, RunLock

HOLDER = """
import sys, time
from pathlib import Path
from spark_fast.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path):
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.take()
    first.take()
    held = json.loads((tmp_path / LOCK).read_text())
    assert (held["pid"], held["host"]) == (os.getpid(), platform.node())
    told = f"{tmp_path} is in use by another run .*pid.: {os.getpid()}, .*host"
    with pytest.raises(CheckpointError, match=told):
        second.take()
    assert json.loads((tmp_path / LOCK).read_text()) == held
    first.release()
    second.take()
    second.release()


def test_the_kernel_lets_go_when_the_holder_is_killed(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match=f'"pid": {child.pid}'):
        RunLock(tmp_path).take()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"the run folder {tmp_path / 'none'} cannot be written"):
        RunLock(tmp_path / "none").take()
