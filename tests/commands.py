"""Commands run inside this process, which spares the seconds that one of their own takes to start."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch

HANG_SECONDS = 600  # a guard against hanging, for what ends by itself: however busy the machine, it is not reached


@contextmanager
def as_it_was() -> Iterator[None]:
    """Afterwards this process's streams, log handlers and threads are as they were."""
    root = logging.getLogger()
    before = sys.stdout, sys.stderr, root.handlers, root.level, torch.get_num_threads()
    try:
        yield
    finally:
        sys.stdout, sys.stderr, root.handlers, level, threads = before
        root.setLevel(level)
        torch.set_num_threads(threads)


def run_here(main: Callable[[list[str]], int], *words: object, code: int = 0) -> SimpleNamespace:
    """Run a command, which must end with this exit code; returns its `stdout` and `stderr`."""
    out, err = io.StringIO(), io.StringIO()
    with as_it_was():
        sys.stdout, sys.stderr, logging.getLogger().handlers = out, err, []
        try:
            found = main([str(word) for word in words])
        except SystemExit as left:  # of the parser
            found = left.code
    assert found == code, f"exit code {found}\n{out.getvalue()}\n{err.getvalue()}"
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())
