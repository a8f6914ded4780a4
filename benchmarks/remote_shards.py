"""Training from an S3 server on loopback with a cache of a tenth of the data: the same batches, and how long it waits.

    pip install s3fs 'moto[server]'
    python benchmarks/remote_shards.py --data_path SHARDS        # a folder of shards that spark-fast-convert wrote

Three measures. The loader's limit and its wait for data at shares of it, as `loader_steady.py` measures them, from the
server and from the disk in turn. Every batch of an epoch, compared with that from the disk. And a run in which the
server, Python's own over HTTP, answers 20 requests with a fault: what arrives must be the same.
The server runs on the same cores as the loader, and so takes from its limit.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from loader_steady import free_running, waiting
from measuring import machine, save
from rich.console import Console
from rich.table import Table

from spark_fast.pipelines import LoaderOptions, Pipeline, View, build_pipeline
from spark_fast.pipelines.sources.shard_format import read_manifest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.pipelines.sources.remote.faulty_server import FAULTS, serving


@dataclass
class Options:
    """What to measure."""

    data_path: Path
    """the folder with manifest.json; with 20 shards or more a block of one and the next fit a tenth"""
    batch: int = 64
    epochs: int = 3
    workers: int = 2
    loads: tuple[float, ...] = (0.5, 0.8)
    """speeds of the training, as shares of the loader's limit from the server"""
    cache: float = 0.1
    """share of the data that the cache holds"""
    name: str = "remote_shards"
    """the result is kept as benchmarks/results/<name>.json"""


def same_batches(one: Pipeline, other: Pipeline, epoch: int) -> int:
    """How many batches of an epoch were compared; raises AssertionError at the first that differs."""
    count = 0
    for a, b in zip(one.epoch(epoch), other.epoch(epoch), strict=True):
        assert torch.equal(a.images, b.images), f"batch {count} differs"
        assert torch.equal(a.ids, b.ids), f"batch {count} is of other images"
        count += 1
    return count


def with_faults(local: Pipeline, data_path: Path, asked: LoaderOptions) -> dict[str, int]:
    """20 faults, spread over the shards; batches compared, faults met, images lost."""
    names = [shard.file for shard in read_manifest(data_path).shards]
    kinds = [kind for kind in FAULTS if kind not in ("silent", "404", "403")]
    with serving(data_path) as server, tempfile.TemporaryDirectory() as cache:
        for i in range(20):
            server.faults.setdefault(names[i % len(names)], []).append(kinds[i % len(kinds)])
        remote = build_pipeline(server.url, replace(asked, cache_dir=cache))
        compared = same_batches(local, remote, 0)
        lost, met = remote.bad_images.substituted, sum(server.met[kind] for kind in FAULTS)
        remote.close()
    return {"compared": compared, "faults": met, "lost": lost}


def main(options: Options) -> None:
    """Measure, print the table and keep the result."""
    torch.set_num_threads(options.workers)
    shards = read_manifest(options.data_path).shards
    size = int(sum(shard.bytes for shard in shards) * options.cache)
    asked = LoaderOptions(options.batch, "torch", workers=options.workers, view=View(shuffle_block=1))
    rows: list[dict[str, Any]] = []
    with ExitStack() as closing:
        from tests.s3_server import s3_of

        url = closing.enter_context(s3_of(options.data_path))
        cache = closing.enter_context(tempfile.TemporaryDirectory())
        asked = replace(asked, cache_size=str(size))
        local = build_pipeline(options.data_path, asked)
        remote = build_pipeline(url, replace(asked, cache_dir=cache))
        closing.callback(local.close)
        closing.callback(remote.close)
        compared = same_batches(local, remote, 0)
        limits = {}
        for name, loader in (("server", remote), ("disk", local)):
            seconds, _ = free_running(loader, options.epochs)
            limits[name] = len(loader) * options.batch / sorted(seconds)[len(seconds) // 2]
        for load in options.loads:
            step = options.batch / (limits["server"] * load)
            waits = {name: waiting(loader, step, 1) for name, loader in (("server", remote), ("disk", local))}
            rows.append({"load": load, "images_per_second": limits["server"] * load, **waits})
        held = sum(entry.stat().st_size for entry in os.scandir(cache))
        faults = with_faults(local, options.data_path, asked)
    table = Table(title=f"limit {limits['server']:.0f} images/s from the server, {limits['disk']:.0f} from the disk")
    for title in ("training speed, of the limit", "waiting, from the server", "from the disk"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(f"{row['load']:.0%}", f"{row['server']:.1%}", f"{row['disk']:.1%}")
    Console().print(table)
    print(f"{compared} batches compared; {faults}; {held} bytes in the cache, of {size} allowed")
    result = {"machine": machine(torch.device("cpu"), options.workers), "batch": options.batch, "limits": limits}
    result |= {"shards": len(shards), "cache": size, "rows": rows, "same_batches": compared, "with_faults": faults}
    print(f"kept in {save(options.name, result)}")


if __name__ == "__main__":
    main(tyro.cli(Options))
