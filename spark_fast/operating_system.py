"""What the operating system says of this machine's cores, of a process, and of this one's memory.

Nothing heavy is imported here: the doctor reads this where torch does not load.
"""

from __future__ import annotations

import os
import re
import sys
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


def peak_resident_bytes() -> int:
    """The most memory that was resident for this process so far."""
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    import resource  # on Linux it would count the peak of the process that started this one, too

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
