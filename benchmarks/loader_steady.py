"""Does a step of training ever wait, and does memory grow: the default pipeline over many epochs.

    python benchmarks/loader_steady.py --data_path SHARDS

First as fast as it goes: the loader's own limit, and the resident memory after every epoch. Then with a step that
sleeps, as one on a GPU looks from the host, for shares of that limit: how much of the time the step waits for data.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from measuring import machine, save
from rich.console import Console
from rich.progress import track
from rich.table import Table

from spark_fast.pipelines import LoaderOptions, Pipeline, build_pipeline


@dataclass
class Options:
    """What to measure."""

    data_path: Path
    batch: int = 64
    epochs: int = 20
    workers: int = 2
    loads: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    """speeds of the training, as shares of the loader's limit"""
    name: str = "loader_steady"
    """the result is kept as benchmarks/results/<name>.json"""


def resident() -> float:
    """MiB of this process in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096 / 2**20


def free_running(loader: Pipeline, epochs: int) -> tuple[list[float], list[float]]:
    """Seconds, and MiB afterwards, of each epoch."""
    seconds, memory = [], []
    for epoch in track(range(epochs), "memory"):
        start = time.perf_counter()
        for _ in loader.epoch(epoch):
            pass
        seconds.append(time.perf_counter() - start)
        memory.append(resident())
    return seconds, memory


def waiting(loader: Pipeline, step: float, epochs: int) -> float:
    """Share of the time spent waiting, after each epoch's first batch, when a step takes `step` seconds."""
    waited = total = 0.0
    for epoch in range(epochs):
        batches = iter(loader.epoch(epoch))
        next(batches)
        begin = time.perf_counter()
        for _ in range(1, len(loader)):
            time.sleep(step)
            asked = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - asked
        total += time.perf_counter() - begin
        batches.close()
    return waited / total


def main(options: Options) -> None:
    """Measure, print the table and keep the result."""
    torch.set_num_threads(options.workers)
    loader = build_pipeline(options.data_path, LoaderOptions(options.batch, "torch", workers=options.workers))
    seconds, memory = free_running(loader, options.epochs)
    limit = len(loader) * options.batch / sorted(seconds)[len(seconds) // 2]
    rows = [
        {"load": load, "images_per_second": limit * load, "wait": waiting(loader, options.batch / (limit * load), 3)}
        for load in track(options.loads, "waiting")
    ]
    loader.close()
    table = Table(
        title=f"limit {limit:.0f} images/s; memory {memory[1]:.0f} MiB after epoch 2, {memory[-1]:.0f} at end"
    )
    for title in ("training speed, of the limit", "images/s", "waiting for data"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(f"{row['load']:.0%}", f"{row['images_per_second']:.0f}", f"{row['wait']:.1%}")
    Console().print(table)
    where = machine(torch.device("cpu"), options.workers)
    result = {"machine": where, "batch": options.batch, "limit": limit, "memory_mib": memory, "rows": rows}
    print(f"kept in {save(options.name, result)}")


if __name__ == "__main__":
    main(tyro.cli(Options))
