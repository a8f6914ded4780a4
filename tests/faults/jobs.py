"""Work for processes of the converter; in a file of its own, as each process imports it."""

from __future__ import annotations

import time
from collections.abc import Callable


def raising(job: str, advance: Callable[[int, int], None]) -> None:
    advance(2, 0)
    raise ZeroDivisionError(job)


def silent(job: float, advance: Callable[[int, int], None]) -> None:
    time.sleep(job)
