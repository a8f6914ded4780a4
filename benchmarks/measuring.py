"""What every benchmark shares: alternate the candidates, take medians, keep the result with its machine."""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

RESULTS = Path(__file__).parent / "results"


def medians(
    candidates: dict[str, Callable[[], tuple[float, ...]]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Run the candidates in turn, so that a change of the machine's speed meets all of them.

    Each returns the seconds of its parts; the result has the median of each part.
    """
    for candidate in candidates.values():
        for _ in range(warmup):
            candidate()
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            times[name].append(candidate())
    return {name: [statistics.median(part) for part in zip(*runs, strict=True)] for name, runs in times.items()}


Rates = TypeVar("Rates", bound=NamedTuple)


def fit_rates(rates: Rates, names: Iterable[str], misfit: Callable[[Rates], float]) -> Rates:
    """The constants of a cost model that make `misfit` least.

    Each in turn is moved by eighths of an octave, or by a whole one, until nothing brings it down.
    """
    moves, best = [(name, 2 ** (step / 8)) for name in names for step in (-8, -1, 1, 8)], misfit(rates)
    while True:
        tried = [rates._replace(**{name: getattr(rates, name) * factor}) for name, factor in moves]
        errors = [misfit(trial) for trial in tried]
        if min(errors) >= best:
            return rates
        best = min(errors)
        rates = tried[errors.index(best)]


def clock(device: torch.device) -> float:
    """Seconds, after everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Where a figure was measured."""
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else model,
        "threads": threads,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of each package; None when it is not installed."""

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {package: of(package) for package in packages}


def start_on_cores(process: BaseProcess, cores: int, first: int = 0) -> None:
    """Start a process that has so many of this one's cores, from the `first` on, and as many threads."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[first : first + cores])  # inherited: threads are counted at import
    os.environ["OMP_NUM_THREADS"] = str(cores)
    try:
        process.start()
    finally:
        os.sched_setaffinity(0, allowed)


def repeated(data_path: Path, copies: int, folder: Path) -> int:
    """Class folders in `folder` with `copies` copies of each image at `data_path`; returns how many files."""
    from spark_fast.pipelines.sources.detect import detect_source

    source = detect_source(data_path)
    for i, copy in itertools.product(range(len(source)), range(copies)):
        label = 0 if source.labels is None else int(source.labels[i])
        path = folder / f"class{label:04d}" / f"{i:06d}_{copy}{Path(source.name(i)).suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read(i))
    return copies * len(source)


def save(name: str, result: dict[str, Any], folder: Path | None = None) -> Path:
    """Write a result as JSON into a folder, benchmarks/results/ where none is given."""
    folder = folder or RESULTS
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def _commit() -> str:
    """Of this project, short; nothing where there is no repository or no git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    except OSError:
        return ""


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
