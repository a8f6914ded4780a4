"""metrics.jsonl: a line of JSON for each log point and evaluation. All lines are whole, and a resume repeats none."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


class MetricsFile:
    """A logger (see `loggers.Logger`) that is a file.

    A line is appended by one call, so that a reader sees it whole; one that does not fit on the disk is removed again.

    Args:
        step: steps of the run done when this process begins; lines of later steps are dropped, as they run again.
    """

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = path.with_name(path.name + ".partial")
            kept.write_bytes(b"".join(line for line in lines if _step_of(line) <= step))
            kept.replace(path)  # atomic: a reader, or a kill, finds the old lines or the new
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def point(self, row: Mapping[str, object], step: int, group: str = "train") -> None:
        """Append a row; raises OSError where it cannot be written, and the file is then as before."""
        line = line_of(row).encode()
        size = os.fstat(self._file).st_size
        try:
            if (written := os.write(self._file, line)) < len(line):
                raise OSError(f"only {written} of {len(line)} bytes could be written to {self._path}")
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def picture(self, grid: Tensor, step: int) -> None:
        """Ignores a picture (3, H, W): pictures are files of their own."""

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def line_of(row: Mapping[str, object]) -> str:
    """A row as a line of JSON, which has no number for infinite and NaN: they become null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, in order; a line still being written is left out. null becomes NaN again.

    Raises:
        OSError: it cannot be read.
    """
    whole = [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if _step_of(line) < math.inf]
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in whole]


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut off when the process was killed
