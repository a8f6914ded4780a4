"""Puts the list of kept results into benchmarks/README.md: machine, date and commit of each.

python benchmarks/results_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from learning_table import line, put_between_marks, table
from measuring import RESULTS

MARKS = ("<!-- results: the table -->", "<!-- results: its end -->")
TITLES = ("file in `benchmarks/results`", "machine", "threads", "torch", "date", "commit")
KEYS = ("device", "threads", "torch", "date", "commit")


def results_table(kept: dict[str, dict[str, Any]]) -> str:
    """The table.

    Args:
        kept: name of a file -> its content, with the `machine` that measured it.
    """
    return table(TITLES, [line((f"`{name}`", *(str(r["machine"][key]) for key in KEYS))) for name, r in kept.items()])


def main(page: Path = RESULTS.parent / "README.md") -> None:
    """Write the table into a page, from all of benchmarks/results/*.json."""
    kept = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    put_between_marks(page, results_table(kept), MARKS)


if __name__ == "__main__":
    main()
