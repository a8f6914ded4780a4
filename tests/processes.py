"""Processes of their own that start at once, for commands that are killed, signalled or short of something.

Importing torch and timm costs a process 5 s of a core. Here one process imports them once a session, and all others
are forked from it: real ones, with a pid, streams, environment and working directory of their own. What is read while
Python or torch starts (PYTHONPATH, say) needs an interpreter of its own.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.commands import HANG_SECONDS

Main = Callable[[list[str]], int]  # of a module: the new process finds it by its name

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "timm", "spark_fast.cli.train", "spark_fast.cli.convert", __name__])


class Forked:
    """A command in a process of its own; `folder` gets its stdout and stderr as files of these names."""

    def __init__(self, main: Main, *words: object, folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        given = (
            main,
            [str(word) for word in words],
            str(folder),
            dict(os.environ if env is None else env),
            str(Path.cwd()),
        )
        self._process = _context.Process(target=_serve, args=given)
        self._process.start()
        self.pid: int = self._process.pid  # type: ignore[assignment]
        atexit.register(self.kill)  # else Python would wait for what a failed test has left

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self) -> int:
        """The same when it has ended."""
        if not wait([self._process.sentinel], HANG_SECONDS):
            self.kill()
            raise TimeoutError(f"not ended after {HANG_SECONDS} s:\n{self.stdout}\n{self.stderr}")
        code = self.poll()
        assert code is not None
        return code

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self._process.join()

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()


def run_forked(main: Main, *words: object, code: int = 0, env: Mapping[str, str] | None = None) -> SimpleNamespace:
    """Run a command, which must end with this exit code; returns its `stdout` and `stderr`."""
    with tempfile.TemporaryDirectory() as folder:
        process = Forked(main, *words, folder=Path(folder), env=env)
        found = process.wait()
        told = SimpleNamespace(stdout=process.stdout, stderr=process.stderr)
    assert found == code, f"exit code {found}\n{told.stdout}\n{told.stderr}"
    return told


def _serve(main: Main, words: list[str], folder: str, env: dict[str, str], place: str) -> None:
    """In the new process."""
    for stream in (sys.stdout, sys.stderr):
        path = Path(folder) / stream.name.strip("<>")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream.fileno())
    os.chdir(place)
    os.environ.clear()
    os.environ.update(env)
    if "OMP_NUM_THREADS" in env:
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.argv = [main.__module__, *words]
    sys.exit(main(words))
