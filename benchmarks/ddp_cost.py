"""What data parallelism costs: two processes of one thread each beside one process of two, at the same global batch.

    python benchmarks/ddp_cost.py

Each measurement is a short run of `spark-fast-train` on generated images; the two ways take turns. A figure is the
median over the log points after the first, then over the runs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from measuring import machine, save
from rich.console import Console
from rich.progress import track
from rich.table import Table


@dataclass
class Options:
    """What to measure."""

    models: tuple[str, ...] = ("resnet50", "convnext_small")
    batch: int = 8
    steps: int = 8
    repeats: int = 3
    precision: str = "fp32"
    name: str = "ddp_cost"
    """the result is kept as benchmarks/results/<name>.json"""


def seconds(model: str, ranks: int, options: Options) -> float:
    """Median seconds of a step."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--exp_dir={folder}/run", f"--model={model}", f"--bs={options.batch}", "--pipeline=synthetic"]
        flags += [f"--precision={options.precision}", f"--threads={2 // ranks}", f"--max_steps={options.steps}"]
        words = [
            sys.executable,
            *launch,
            "-m",
            "spark_fast.train",
            "bench",
            *flags,
            "--log_every=1",
            "--picture_every=0",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(2 // ranks)}
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        metrics = Path(folder) / "run" / "metrics.jsonl"
        if not metrics.exists():
            raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr}")
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return statistics.median(row["step_seconds"] for row in rows[1:])


def main(options: Options) -> None:
    """Measure, print the table and keep the result."""
    table = Table(title=f"seconds of a step, global batch {options.batch}, {options.precision}, two cores")
    for title in ("network", "one process", "two processes", "cost"):
        table.add_column(title, justify="right")
    rows = []
    for model in options.models:
        runs = [(seconds(model, 1, options), seconds(model, 2, options)) for _ in track(range(options.repeats), model)]
        one, two = (statistics.median(times) for times in zip(*runs, strict=True))
        rows.append({"model": model, "one": one, "two": two, "cost": two / one - 1})
        table.add_row(model, f"{one:.2f}", f"{two:.2f}", f"{two / one - 1:+.1%}")
    Console().print(table)
    where = machine(torch.device("cpu"), 2)
    settings = {"batch": options.batch, "steps": options.steps, "precision": options.precision}
    print(f"kept in {save(options.name, {'settings': settings, 'machine': where, 'rows': rows})}")


if __name__ == "__main__":
    main(tyro.cli(Options))
