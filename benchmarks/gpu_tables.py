"""Puts what a GPU gave into README and docs/explanation/gpu.md, from rows of `first_minutes.sh` or `device_report.py`.

    python benchmarks/gpu_tables.py benchmarks/results/first_minutes_h200.jsonl

Without a file it takes the newest one in benchmarks/results/. What has no row there is shown as not measured, and so is
all where there is no file. Rows of a rehearsal are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as it is: nothing need be installed

import torch  # noqa: E402
from device_jobs import FULL  # noqa: E402
from device_parts import all_parts  # noqa: E402
from learning_table import line, put_between_marks, table  # noqa: E402
from measuring import RESULTS  # noqa: E402

MARKS = ("<!-- gpu: the table -->", "<!-- gpu: its end -->")
ABSENT = "not measured"
Rows = dict[tuple[str, str], dict[str, Any]]
Column = tuple[str, Callable[[dict[str, Any]], str]]

TABLES: dict[str, tuple[str, tuple[Column, ...]]] = {  # title -> parts, columns
    "Ceilings": ("ceilings", (
        ("GB/s", lambda row: f"{row['GB/s']:.0f}" if "GB/s" in row else ""),
        ("TFLOP/s", lambda row: f"{row['TFLOP/s']:.0f}" if "TFLOP/s" in row else ""),
    )),
    "Steps": ("*step *", (
        ("batch", lambda row: f"{row['batch']}"),
        ("images/s", lambda row: f"{row['images/s']:.0f}"),
        ("ms", lambda row: f"{1000 * row['seconds']:.1f}"),
        ("ms of the host", lambda row: f"{1000 * row['host seconds']:.1f}"),
        ("MFU", lambda row: f"{row['MFU']:.1%}"),
        ("peak GiB", lambda row: f"{row['peak GiB']:.1f}"),
    )),
    "Encoder": ("encoder", (("ms", lambda row: f"{1000 * row['seconds']:.1f}"),)),
    "Layers": ("layers", (
        ("chosen", lambda row: row.get("rates") or row["chosen"]),
        ("its ms", lambda row: _milliseconds(row, row.get("chosen"))),
        ("fastest", lambda row: _fastest(row)),
        ("its ms", lambda row: _milliseconds(row, _fastest(row))),
    )),
    "Loader": ("loader", (
        ("images/s", lambda row: f"{row['images/s']:.0f}"),
        ("waiting for data", lambda row: f"{row['data wait']:.1%}" if "data wait" in row else ""),
        ("note", lambda row: row.get("note", "")),
    )),
    "Packed = masked": ("packed = masked", (
        ("packed gradient off by", lambda row: f"{row['packed gradient off by']:.1e}"),
        ("times masked", lambda row: f"{row['gradient ratio']:.2f}"),
    )),
    "Tests": ("GPU tests", (("pytest", lambda row: row["pytest"].strip("= ")),)),
    "Longest kernels": ("profile", (
        ("ms a step", lambda row: f"{row['ms']:.1f}"),
        ("launches", lambda row: f"{row['launches']}"),
        ("longest", lambda row: "; ".join(f"`{k[:40]}` {v:.2f} ms" for k, v in list(row["longest"].items())[:5])),
    )),
}  # fmt: skip


def read(path: Path) -> Rows:
    """(part, name) -> the row, the last one of each; the last line may be incomplete.

    Raises:
        ValueError: a rehearsal, or no rows of a report.
    """
    rows: Rows = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(lines, start=1):
        try:
            row = json.loads(text)
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: no row of a report") from None
        if "part" in row:
            rows[row["part"], row["name"]] = row
    machine = rows.get(("ceilings", "machine"))
    if machine is None:
        raise ValueError(f"{path} has no row of the machine, which `--only ceilings` writes first")
    if machine["smoke_test"]:
        raise ValueError(f"{path} is a rehearsal on {machine['device']}: its figures mean nothing")
    return rows


def headline(rows: Rows) -> str:
    """README's: each network packed, beside masked in the same precision and beside the published way."""
    if not rows:
        return f"{source(rows)}\n"
    lines = []
    for shape in FULL.step_shapes[:2]:
        part = f"step {shape.model} {shape.size}"
        measured = [rows.get((part, way), {}) for way in ("packed Triton", "masked", "published")]
        packed, masked, published = rates = [row.get("images/s") for row in measured]
        batches = dict.fromkeys(str(row["batch"]) for row in measured if "batch" in row) or [str(shape.batch)]
        cells = [f"{rate:.0f}" if rate else ABSENT for rate in rates]
        ratios = [f"**{packed / rate:.2f}x**" if packed and rate else ABSENT for rate in (masked, published)]
        lines.append(line((shape.model, "/".join(batches), cells[0], cells[1], ratios[0], cells[2], ratios[1])))
    titles = ("on a GPU, images/s", "batch", "packed bf16", "masked bf16", "ratio", "as published, TF32", "ratio")
    return f"{table(titles, lines)}\n{source(rows)}\n"


def details(rows: Rows) -> str:
    """docs/explanation/gpu.md's: every row that a report can have, of the parts that have any."""
    if not rows:
        return f"{source(rows)}\n"
    parts = all_parts(FULL, torch.device("cuda"), RESULTS)
    texts = [source(rows)]
    for title, (pattern, columns) in TABLES.items():
        names = [(p, job.name) for p, jobs in parts.items() if fnmatchcase(p, pattern) for job in jobs]
        names = [name for name in names if name[1] != "machine"]
        if not any(name in rows for name in names):
            texts.append(f"{title}: {ABSENT}.")
            continue
        lines = [line((part, name, *_cells(rows.get((part, name)), columns))) for part, name in names]
        texts.append(table(("part", title.lower(), *(name for name, _ in columns)), lines).rstrip())
    return "\n\n".join(texts) + "\n"


def source(rows: Rows) -> str:
    """Where and with what it was measured."""
    if not rows:
        return f"On a GPU: {ABSENT} yet."
    machine = rows["ceilings", "machine"]
    commit = f"commit {machine['commit']}" if machine["commit"] else "commit not known there"
    return f"{machine['device']}, torch {machine['torch']}, Python {machine['python']}, {commit}, {machine['date']}."


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 2 where the file is none of a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="?", help="a file of JSON lines (the newest in benchmarks/results)")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the checkout whose pages are written")
    options = parser.parse_args(argv)
    kept = [path for name in ("first_minutes", "device_report") for path in RESULTS.glob(f"{name}*.jsonl")]
    path = options.rows or max(kept, key=lambda path: path.stat().st_mtime, default=None)
    try:
        rows = read(path) if path else {}
    except (OSError, ValueError) as error:
        print(f"gpu_tables: {error}", file=sys.stderr)
        return 2
    for page, text in (("README.md", headline(rows)), ("docs/explanation/gpu.md", details(rows))):
        put_between_marks(options.root / page, text, MARKS)
    print(f"README.md and docs/explanation/gpu.md: {source(rows)}")
    return 0


def _fastest(row: dict[str, Any]) -> str:
    names = [key.removesuffix(" ms") for key in row if key.endswith(" ms")]
    return min(names, key=lambda name: row[f"{name} ms"], default="")


def _milliseconds(row: dict[str, Any], name: str | None) -> str:
    return f"{row[f'{name} ms']:.3f}" if name else ""


def _cells(row: dict[str, Any] | None, columns: tuple[Column, ...]) -> list[str]:
    """A cell for each column; of a row that was not measured the reason alone."""
    why = ABSENT if row is None else next((f"{k}: {row[k]}" for k in ("skipped", "error") if k in row), "")
    if row is None or why:
        return [" ".join(why.split()).replace("|", "/")[:160], *[""] * (len(columns) - 1)]
    return [cell(row) for _, cell in columns]


if __name__ == "__main__":
    sys.exit(main())
