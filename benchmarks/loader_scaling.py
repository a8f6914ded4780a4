"""What a second core brings the `torch` pipeline, and what it could bring at most on this machine.

    python benchmarks/loader_scaling.py --data_path ../shared/data/imagenet_sample

One process on one core, one on two, and two processes with a core each at the same time, which share neither an
interpreter nor memory: what those reach together is what the cores, their caches and the memory allow.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from loader_throughput import LIBRARIES, Options, Pinned, make_stores
from measuring import machine, medians, save, versions
from rich.console import Console
from rich.progress import track
from rich.table import Table

from spark_fast.pipelines.sources.detect import detect_source

OURS = "torch (ours)"


@dataclass
class Scaling(Options):
    """What to measure; `cores` and `only` are not used."""

    copies: int = 4
    name: str = "loader_scaling"


def measure(store: Path, options: Scaling) -> dict[str, float]:
    """Images per second: one core, two cores, a process on each of two."""
    epoch = len(detect_source(store)) // options.batch * options.batch
    ways = {"one": (1, 0), "other": (1, 1), "two": (2, 0)}
    running = {way: Pinned(OURS, store, options.batch, *cores) for way, cores in ways.items()}

    def apart() -> tuple[float]:
        pair = [running["one"], running["other"]]
        for process in pair:
            process.begin()
        return (statistics.harmonic_mean([process.end()[0] for process in pair]) / 2,)  # their rates add up

    try:
        seconds = medians({"one core": running["one"], "two cores": running["two"], "apart": apart}, options.repeats)
    finally:
        for process in running.values():
            process.close()
    return {way: epoch / time for way, (time,) in seconds.items()}


def main(options: Scaling) -> None:
    """Make the stores, measure each, print the table and keep the result."""
    with tempfile.TemporaryDirectory() as temporary:
        stores = make_stores(options, options.work or Path(temporary))
        rates = {name: measure(store, options) for name, store in track(stores.items(), "measuring")}
    table = Table(title="images per second; of one core's in brackets")
    for title in ("store", "one core", "two cores", "a process on each of two"):
        table.add_column(title, justify="right")
    for name, rate in rates.items():
        table.add_row(name, *(f"{r:.0f} ({r / rate['one core']:.2f})" for r in rate.values()))
    Console(width=100).print(table)
    settings = {"copies": options.copies, "batch": options.batch, "repeats": options.repeats}
    where = machine(torch.device("cpu"), 2) | {"versions": versions(LIBRARIES)}
    print(f"kept in {save(options.name, {'settings': settings, 'machine': where, 'images_per_second': rates})}")


if __name__ == "__main__":
    main(tyro.cli(Scaling))
