"""metrics.jsonl: a line of JSON for each log point and evaluation, whole at any time, and none twice after a resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


class MetricsFile:
    """A logger (see `loggers.Logger`) that is a file.

    Lines are appended by one call each, so a reader sees whole ones; one that does not fit on the disk is taken back.

    Args:
        step: where this process begins; lines of steps that will be run again are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = path.with_name(path.name + ".partial")
            kept.write_bytes(b"".join(line for line in lines if _step_of(line) <= step))
            kept.replace(path)  # whoever reads it meanwhile, or a kill, finds the old lines or the new
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
        """Pictures are files of their own."""

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
