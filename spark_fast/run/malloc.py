"""Keep freed memory in the process, for training on the CPU.

glibc returns every large tensor to the kernel when it is freed, and the next one of that size is faulted in and
zeroed again page by page: a quarter of a training step's time. Keeping the heap costs no more memory than the peak.
"""

from __future__ import annotations

import ctypes
import logging

log = logging.getLogger("spark_fast")

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_heap() -> None:
    """Stop glibc from mapping and unmapping large blocks; without glibc, say that nothing was done."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        log.info("this C library has no mallopt, so large tensors are allocated again in every step, which is slower")
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
