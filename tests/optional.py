"""Which of the optional packages are not here."""

from __future__ import annotations

from functools import cache
from importlib import import_module

MODULES = {
    "ffcv": "ffcv.loader",
    "dali": "nvidia.dali",
    "s3": "tests.s3_server",
    "gs": "tests.gs_server",
    "ray": "ray",
}  # by pytest marker


@cache
def missing(decoder: str) -> str:
    """Why it cannot be used, and what to do; nothing if it can."""
    try:
        import_module(MODULES[decoder])
    except (ImportError, OSError) as error:  # OSError: FFCV without the libraries it was compiled against
        return f"{decoder} is not installed ({error}): bash tools/test_backends.sh"
    return ""
