"""What the operating system says of this machine's cores and of a process.

Nothing heavy is imported here: the doctor reads this where torch does not load.
"""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_state(pid: int | None) -> str:
    """The kernel's letter for the state of a process, such as R or T; "?" where there is no /proc or no such one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return "?"
