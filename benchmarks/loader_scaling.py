"""What a second core brings the `torch` pipeline, in threads and in worker processes, and what more cores would.

    nice -n -10 python benchmarks/loader_scaling.py --data_path ../shared/data/imagenet_sample

Each way runs in a process pinned to its cores before anything is imported; they take turns, figures are medians.
Beside the images per second, of all processes: their memory (PSS), and the time an image for which Python's lock is
held in the process that trains. It is measured twice. A thread of pure Python runs beside the loader: what it sleeps,
as the kernel counts it, it waits for the lock. And the processor time of the thread that takes the batches, which
holds the lock for less where worker processes decode. An image's time is the processor time of all processes.

"2 programs" are two that share nothing, each with a core of its own: what this machine's second core brings at most.

Where others use the machine, "undisturbed" is what to look at: there the time for which a thread waits for a core is
not counted against it.

With a share s of an image's time under one lock, n cores give at most Amdahl's 1 / (s + (1 - s) / n) times one core.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import band_loaders
import torch
import tyro
from loader_throughput import LIBRARIES, ORIGINALS, STORES, convert
from measuring import machine, repeated, save, start_on_cores, versions
from rich.console import Console
from rich.progress import track
from rich.table import Table

from spark_fast.pipelines import Batch, LoaderOptions, build_pipeline

CORES = (1, 2, 4, 8, 16, 64)  # of the projection
BATCHES_BESIDE = 3  # that are taken while a busy thread runs


def awake(task: str) -> float:
    """Seconds for which a thread has run, or waited for a core."""
    return sum(map(int, Path(f"/proc/{task}/schedstat").read_text(encoding="utf-8").split()[:2])) / 1e9


class Way(NamedTuple):
    """A number of decoding threads, one a core, and of processes that they are spread over; in each of so many programs
    that know nothing of each other."""

    cores: int
    processes: int
    programs: int = 1


WAYS = {
    "threads, 1 core": Way(1, 0),
    "threads, 2 cores": Way(2, 0),
    "1 process, 2 cores": Way(2, 1),
    "2 processes, 2 cores": Way(2, 2),
    "2 programs, 1 core each": Way(1, 0, programs=2),
}


@dataclass
class Options:
    """What to measure."""

    data_path: Path
    """a folder of class folders, or one that holds train/"""
    copies: int = 4
    """of each photograph and TIFF file, so that an epoch takes seconds: one begins and ends with idle workers"""
    batch: int = 64
    repeats: int = 5
    """measurements of each figure"""
    epochs: int = 20
    """after which the memory is looked at again"""
    stores: tuple[str, ...] = ()
    """those measured, by their names; none named: all four"""
    work: Path | None = None
    """where the stores are made and kept; none: a temporary folder"""
    name: str = "loader_scaling"
    """the result is kept as benchmarks/results/<name>.json"""


def make_stores(options: Options, work: Path) -> dict[str, tuple[Path, int]]:
    """Four stores and their channels: photographs as they are and in shards; 1 and 12 channels of 16 bits."""
    originals, tiffs, shards = work / "originals", work / "1_channels", work / "12_channels_shards"
    if not originals.exists():
        repeated(options.data_path, options.copies, originals)
    if not tiffs.exists():
        band_loaders.write_files(work / "1_channel", 1, 400)
        repeated(work / "1_channel", options.copies, tiffs)
    if not shards.exists():
        band_loaders.write_files(work / "12_channels", 12, 400)
        convert(work / "12_channels", shards, ("--in_chans", "12", "--short_side", "0"))
    name, flags = "short 256", STORES["short 256"]
    converted = work / "short_256"
    if not converted.exists():
        convert(originals, converted, flags)
    return {
        ORIGINALS: (originals, 3),
        f"{name}, shards": (converted, 3),
        "1 x 16 bit, TIFF": (tiffs, 1),
        "12 x 16 bit, shards": (shards, 12),
    }


def processor_seconds(pid: int) -> float:
    """Of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def proportional_memory(pid: int) -> float:
    """MiB of a process, what it shares divided by those that share it."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def family() -> list[int]:
    """This process and all that it has started."""
    found = [os.getpid()]
    for pid in found:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text(encoding="utf-8").split())
    return found


def decoders() -> list[str]:
    """The threads that decode: here, or all but the first of each worker process."""
    own = [f"self/task/{t.native_id}" for t in threading.enumerate() if t.name.startswith("decode")]
    tasks = [(pid, task.name) for pid in family()[1:] for task in Path(f"/proc/{pid}/task").iterdir()]
    return own or [f"{pid}/task/{task}" for pid, task in tasks if int(task) != pid]


@contextmanager
def busy_thread() -> Iterator[list[float]]:
    """A thread of pure Python beside; afterwards the list holds the seconds for which it waited for the lock."""
    waited: list[float] = []
    stop = False

    def spin() -> None:
        task = f"self/task/{threading.get_native_id()}"
        start, before = time.perf_counter(), awake(task)
        while not stop:
            for _ in range(1000):
                pass
        waited.append(time.perf_counter() - start - (awake(task) - before))

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield waited
    finally:
        stop = True
        thread.join()


def images_of(batches: Iterable[Batch]) -> int:
    """How many there are, when all have been taken."""
    return sum(len(batch.ids) for batch in batches)


def serve(store: Path, channels: int, way: Way, batch: int, pipe: Connection) -> None:
    """In a process of its own: an epoch for every request, and what it took per image."""
    asked: dict[str, Any] = {"in_chans": channels} if channels != 3 else {}
    options = LoaderOptions(batch, "torch", workers=way.cores, worker_processes=way.processes, **asked)
    loader, number = build_pipeline(store, options), 0
    images_of(loader.epoch(number))  # starts the processes
    while (beside := pipe.recv()) is not None:
        number += 1
        if beside:
            batches = loader.epoch(number)
            with closing(batches), busy_thread() as waited:  # a part of them: it is slow where they hold the lock
                images = images_of(islice(batches, BATCHES_BESIDE))
            pipe.send({"lock": waited[0] / images})
            continue
        tasks = decoders()
        before = sum(map(processor_seconds, family())), sum(map(awake, tasks))
        own, start = time.thread_time(), time.perf_counter()
        images = images_of(loader.epoch(number))
        seconds, own = time.perf_counter() - start, time.thread_time() - own
        processor = sum(map(processor_seconds, family())) - before[0]
        asleep = 1 - (sum(map(awake, tasks)) - before[1]) / (way.cores * seconds)
        found = {"seconds": seconds / images, "consumer": own / images, "processor": processor / images}
        found["asleep"] = asleep
        pipe.send(found | {"memory": sum(map(proportional_memory, family()))})
    loader.close()


class Pinned:
    """A way to read a store: programs of which each may use its own cores alone, the first ones of the machine."""

    def __init__(self, store: Path, channels: int, way: Way, batch: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._programs: list[tuple[BaseProcess, Connection]] = []
        for i in range(way.programs):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(store, channels, way, batch, theirs))
            start_on_cores(process, way.cores, first=i * way.cores)
            theirs.close()
            self._programs.append((process, ours))

    def __call__(self, beside: bool = False) -> dict[str, float]:
        """What an epoch took, of all programs at once; `beside`: with a busy thread."""
        for _, pipe in self._programs:
            pipe.send(beside)
        rows = [pipe.recv() for _, pipe in self._programs]
        found = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        if "seconds" in found:
            found["seconds"] = 1 / sum(1 / row["seconds"] for row in rows)
            found["memory"] *= len(rows)
        return found

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._programs:
            pipe.send(None)
            process.join()


def measure(store: tuple[Path, int], options: Options) -> dict[str, dict[str, float]]:
    """The medians of each way, in turn; after the first epoch, which starts the processes."""
    running = {name: Pinned(*store, way, options.batch) for name, way in WAYS.items()}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    try:
        for way in running.values():
            way()
        for _ in range(options.repeats):
            for name, way in running.items():
                figures[name].append(way() | way(beside=True))
        for name in ("threads, 2 cores", "2 processes, 2 cores"):
            for _ in range(options.epochs - 2 * options.repeats - 2):
                running[name]()
            figures[name][-1]["memory after"] = running[name]()["memory"]
    finally:
        for way in running.values():
            way.close()
    return {name: {key: median(row[key] for row in rows if key in row) for key in rows[-1]} for name, rows in
            figures.items()}  # fmt: skip


def undisturbed(row: dict[str, float], one: dict[str, float], cores: int) -> float:
    """Images of one core's, as if each decoding thread had had a core whenever it wanted one.

    The cores, times the share of the time in which its threads did not sleep (for the lock, for orders, for a disk),
    times one core's processor time of an image over this one's.
    """
    return cores * (1 - row["asleep"]) / (1 - one["asleep"]) * one["processor"] / row["processor"]


def show(found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print a row a store and way."""
    table = Table(title="PSS in MiB; under the lock: busy thread beside / the consumer's processor time")
    titles = ("store", "way", "images/s", "of 1 core", "undisturbed", "ms an image", "under the lock", "PSS", "later")
    for title in titles:
        table.add_column(title, justify="right")
    for store, ways in found.items():
        one = ways["threads, 1 core"]["seconds"]
        for name, row in ways.items():
            lock, consumer = row["lock"] / row["processor"], row["consumer"] / row["processor"]
            table.add_row(
                store,
                name,
                f"{1 / row['seconds']:.0f}",
                f"{one / row['seconds']:.2f}",
                f"{undisturbed(row, ways['threads, 1 core'], WAYS[name].cores * WAYS[name].programs):.2f}",
                f"{1e3 * row['processor']:.2f}",
                f"{lock:.1%} / {consumer:.1%}",
                f"{row['memory']:.0f}",
                f"{row['memory after']:.0f}" if "memory after" in row else "",
            )
    Console(width=120).print(table)


def share(row: dict[str, float], way: Way) -> float:
    """Of an image's time under the lock of the process that trains, at most.

    With worker processes the consumer's thread alone takes it, and its processor time is the closer bound: the busy
    thread also waits while the kernel keeps the thread that has the lock from a core.
    """
    return row["consumer" if way.processes else "lock"] / row["processor"]


def projection(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Of one core's images per second, on CORES cores: Amdahl's 1 / (s + (1 - s) / n)."""

    def times(s: float) -> list[float]:
        return [1 / (s + (1 - s) / n) for n in CORES]

    return {store: {way: times(share(row, WAYS[way])) for way, row in ways.items()} for store, ways in found.items()}


def main(options: Options) -> None:
    """Make the stores, measure each, print the tables and keep the result."""
    with tempfile.TemporaryDirectory() as temporary:
        stores = make_stores(options, options.work or Path(temporary))
        found = {}
        for name in track(options.stores or list(stores), "measuring"):
            found[name] = measure(stores[name], options)
            show({name: found[name]})  # at once: all take a quarter of an hour
    projected = projection(found)
    table = Table(title="times one core, at most, by the share under the lock")
    for title in ("store", "way", *map(str, CORES)):
        table.add_column(title, justify="right")
    for store, ways in projected.items():
        for name in ("threads, 2 cores", "2 processes, 2 cores"):
            table.add_row(store, name, *(f"{factor:.1f}" for factor in ways[name]))
    Console(width=120).print(table)
    settings = {"copies": options.copies, "batch": options.batch, "repeats": options.repeats}
    where = machine(torch.device("cpu"), 2) | {"versions": versions(LIBRARIES), "load": os.getloadavg()}
    result = {"settings": settings, "machine": where, "per_image": found, "projection": projected}
    print(f"kept in {save(options.name, result)}")


if __name__ == "__main__":
    main(tyro.cli(Options))
