"""Damage done to files."""

from __future__ import annotations

from pathlib import Path


def flip(path: Path, at: int, bit: int = 4) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bit]))
