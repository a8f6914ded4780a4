"""`spark-fast-train` with one real fault at a chosen point of a save: a signal, or a file system that takes no more.

Its command line is POINT N ACTION [flags of spark-fast-train], in a process of its own (tests/processes.py). POINT is
the system call that is about to be made (`POINTS`), N says at which occurrence. The fault comes from the thread that
writes, so it hits the save and nothing else, whatever the speed of the machine.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable

from spark_fast.checkpoint.file import _Hashed
from spark_fast.cli import train

POINTS: dict[str, tuple[str, str]] = {  # name -> audit event, how its path ends
    "nothing written": ("open", r"step_\d+\.pth\.partial"),
    "half written": ("half", ""),
    "no checksum": ("open", r"\.sha256\.partial"),
    "checksum unnamed": ("os.rename", r"\.sha256\.partial"),
    "no name": ("os.rename", r"step_\d+\.pth\.partial"),
    "no link": ("os.symlink", r"step_\d+\.pth"),
    "link unnamed": ("os.rename", r"ckpt-last\.pth\.partial"),
    "no line": ("open", r"checkpoints\.jsonl"),
    "pruning": ("os.remove", r"step_\d+\.pth"),
    "half pruned": ("os.remove", r"\.sha256"),
}


def arm(point: str, number: int, action: Callable[[], None]) -> None:
    """Have `action` called at the `number`th time that this process comes to a point of a save."""
    event, end = POINTS[point]
    left = [number]

    def hook(name: str, arguments: tuple) -> None:
        paths = [os.fspath(a) for a in arguments if isinstance(a, (str, os.PathLike))]
        if name == event and any(re.search(f"{end}$", path) for path in paths):
            left[0] -= 1
            if left[0] == 0:
                action()

    if event == "half":
        _arm_write(left, action)
    else:
        sys.addaudithook(hook)


def _arm_write(left: list[int], action: Callable[[], None]) -> None:
    """Half of the bytes of the largest write are on disk."""
    write = _Hashed.write

    def half(self: _Hashed, content: bytes) -> int:
        left[0] -= 1
        if left[0] == 0:
            write(self, bytes(content)[: len(content) // 2])
            self._file.flush()
            action()
        return write(self, content)

    _Hashed.write = half  # type: ignore[method-assign]


def kill() -> None:
    """SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def send(*numbers: int) -> None:
    """Signals to this process, some seconds apart: only one more than a second after the first, as the main thread
    met it, counts as the second. After a second one it hangs: only the signal can end it."""
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(5 if len(numbers) > 1 else 0)
    while len(numbers) > 1:
        time.sleep(1)


def full_disk() -> None:
    """From now on no file grows beyond 100 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def full_disk_once() -> None:
    """The same, until the next save begins."""
    full_disk()
    enough = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    # the second time: a hook added within a hook is called for the same event
    arm("nothing written", 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, enough))


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": kill,
    "full": full_disk,
    "full once": full_disk_once,
    **{name: lambda n=name: send(getattr(signal, n)) for name in ("SIGINT", "SIGTERM", "SIGUSR1")},  # type: ignore[misc]
    "twice": lambda: send(signal.SIGTERM, signal.SIGTERM),
}


def main(words: list[str]) -> int:
    point, number, action, *flags = words
    arm(point, int(number), ACTIONS[action])
    return train.main(flags)
