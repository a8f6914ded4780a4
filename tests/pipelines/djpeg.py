"""What libjpeg's own command says of a JPEG."""

from __future__ import annotations

import subprocess


def exit_code(data: bytes) -> int:
    """0: decoded; 1: not decoded; 2: decoded with a warning."""
    return run(data)[0]


def run(data: bytes) -> tuple[int, str]:
    """Exit code and message."""
    done = subprocess.run(["djpeg"], input=data, capture_output=True, check=False)
    return done.returncode, done.stderr.decode(errors="replace").strip()
