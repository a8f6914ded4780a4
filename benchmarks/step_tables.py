"""Puts the table of whole steps into README, from what `train_step.py` measured.

python benchmarks/step_tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from learning_table import line, put_between_marks, table
from measuring import RESULTS

MARKS = ("<!-- steps: the table -->", "<!-- steps: its end -->")
TITLES = ("method", "network", "mask", "precision", "encoder", "whole step", "step vs published code")
METHODS = {"spark": "SparK", "fcmae": "FCMAE"}
PUBLISHED = "masked fp32 NCHW, published decoder"


def headline(result: dict[str, Any]) -> str:
    """The table: like for like first, and the machine below it.

    Args:
        result: of `train_step.py`, as it was kept.
    """
    found = {(row.get("method", "spark"), row["model"], row["mask"], row["candidate"]): row for row in result["rows"]}
    lines = []
    for (method, model, mask, candidate), row in found.items():
        kind, _, precision = candidate.partition(" ")
        masked = found.get((method, model, mask, f"masked {precision}"))
        if kind != "packed" or masked is None:
            continue
        published = found.get(("spark", model, mask, PUBLISHED))
        beside = f"{published['step'] / row['step']:.2f}x" if published else ""
        cells = (_ratio(masked["encoder"], row["encoder"]), _ratio(masked["step"], row["step"]), beside)
        lines.append(line((METHODS[method], model, f"{mask:g}", precision, *cells)))
    machine, settings = result["machine"], result["settings"]
    where = (
        f"Seconds, masked to packed, {settings['size']} px, batch {result['rows'][0]['batch']},"
        f" {machine['threads']} threads of {machine['device']},\n"
        f"torch {machine['torch']}, {machine['date']}, commit {machine['commit']}:"
        f" medians of {settings['repeats']} alternating runs of `python benchmarks/train_step.py`."
    )
    return table(TITLES, lines) + "\n" + where


def _ratio(before: float, after: float) -> str:
    return f"{before:.2f} to {after:.2f} s, **{before / after:.2f}x**"


def main(page: Path = RESULTS.parents[1] / "README.md") -> None:
    """Write the table into a page, from benchmarks/results/train_step.json."""
    result = json.loads((RESULTS / "train_step.json").read_text(encoding="utf-8"))
    put_between_marks(page, headline(result) + "\n", MARKS)


if __name__ == "__main__":
    main()
