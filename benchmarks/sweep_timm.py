"""Pack and verify every network of timm; write the table that `build_spark` consults and the docs show.

    python benchmarks/sweep_timm.py                  # all of timm.list_models(): under an hour on two cores
    python benchmarks/sweep_timm.py "resnet*" regnetx_002 --dry_run

Each network is refused on the meta device where its layers alone tell (attention), and else built and run through
`spark_fast.verify` on 64x96 pixels in float64. Results are written as they come, and a stopped sweep goes on.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import timm
import torch
from rich.progress import track

from spark_fast.encoder import UnsupportedLayerError
from spark_fast.encoder.convert_network import check_layers
from spark_fast.encoder.verify import verify
from spark_fast.networks import build_network

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "spark_fast" / "sweeps" / f"timm-{timm.__version__}.json"
PAGE = ROOT / "docs" / "reference" / "networks.md"
HUGE = 250e6  # parameters: verified one at a time, they need the memory


def verify_network(name: str) -> tuple[str, float | None, str]:
    """(name, largest difference or None, reason of refusal)."""
    logging.disable(logging.WARNING)
    try:
        with torch.device("meta"):
            check_layers(build_network(name))
        found = verify(build_network(name))
        return name, max(found.identity, found.leak), ""
    except ValueError as error:
        return name, None, str(error).removeprefix("cannot be packed: ")
    except Exception as error:  # a network that fails in its own way is refused with that, and the sweep goes on
        return name, None, f"{type(error).__name__}: {error}"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["*"], help="names or patterns; all by default")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--again", action="store_true", help="also those that the table already has")
    parser.add_argument("--dry_run", action="store_true", help="print, write nothing")
    options = parser.parse_args(argv)
    names = [n for n in timm.list_models() if any(fnmatch.fnmatch(n, p) for p in options.models)]
    if not names:
        parser.error(f"no model of timm {timm.__version__} is called {' or '.join(options.models)}")
    known = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.is_file() else {"verified": {}, "refused": {}}
    todo = [n for n in names if options.again or not any(n in known[k] for k in known)]
    print(f"timm {timm.__version__}: {len(todo)} networks to check", flush=True)
    started = time.monotonic()
    for done, (name, difference, reason) in enumerate(results(todo, options.workers)):
        for part in known.values():
            part.pop(name, None)
        known["refused" if difference is None else "verified"][name] = reason or float(f"{difference:.1g}")
        if options.dry_run:
            print(name, reason or f"{difference:.0e}", flush=True)
        elif done % 20 == 19:
            write(known)
    if not options.dry_run:
        write(known)
        PAGE.write_text(page(known), encoding="utf-8")
    verified = sum(n in known["verified"] for n in names)
    minutes = (time.monotonic() - started) / 60
    print(f"{verified} of {len(names)} networks verified, {len(names) - verified} refused; {minutes:.1f} minutes")
    return 0


def results(names: list[str], workers: int) -> Iterator[tuple[str, float | None, str]]:
    """`verify_network` of every name, from small to large, the huge ones last and alone."""
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        every = track(pool.map(size, names), "sizes", total=len(names), transient=True)
        sizes = dict(zip(names, every, strict=True))
        ordered = sorted(names, key=sizes.__getitem__)
        futures = [pool.submit(verify_network, n) for n in ordered if sizes[n] <= HUGE]
        for future in track(as_completed(futures), "networks", total=len(futures)):
            yield future.result()
    for name in track([n for n in ordered if sizes[n] > HUGE], "the largest"):
        with ProcessPoolExecutor(1, context) as pool:  # a process each: its memory comes back
            yield pool.submit(verify_network, name).result()


def size(name: str) -> int:
    """Parameters; 0 where the layers alone tell that it is refused."""
    with torch.device("meta"):
        try:
            network = build_network(name)
            check_layers(network)
        except (UnsupportedLayerError, ValueError):
            return 0
    return sum(p.numel() for p in network.parameters())


def write(known: dict) -> None:
    """The table, sorted, whole or not at all."""
    TABLE.parent.mkdir(exist_ok=True)
    partial = TABLE.with_suffix(".partial")
    partial.write_text(
        json.dumps({k: dict(sorted(v.items())) for k, v in known.items()}, indent=1) + "\n", encoding="utf-8"
    )
    partial.replace(TABLE)


def page(known: dict) -> str:
    """The table as a page of the docs, by family (the module of timm)."""
    families: dict[str, tuple[list[str], dict[str, list[str]]]] = defaultdict(lambda: ([], defaultdict(list)))
    for name in known["verified"]:
        families[_family(name)][0].append(name)
    for name, reason in known["refused"].items():
        families[_family(name)][1][_short(reason)].append(name)
    lines = [
        "# Every network of timm",
        "",
        f"Written by `python benchmarks/sweep_timm.py` with timm {timm.__version__}, torch {torch.__version__}: "
        f"**{len(known['verified'])} networks verified**, {len(known['refused'])} refused.",
        "",
        "Verified means that `spark_fast.verify` ran on it: with nothing masked the packed encoder equals the network "
        "in every feature and gradient (float64, training and evaluation), and masked pixels reach nothing.",
        "",
        "## Verified",
        "",
        "| family | networks | their names |",
        "| --- | --- | --- |",
    ]
    for family, (verified, _) in sorted(families.items()):
        if verified:
            lines.append(f"| {family} | {len(verified)} | {' '.join(sorted(verified))} |")
    lines += ["", "## Refused", "", "| family | networks | reason | their names |", "| --- | --- | --- | --- |"]
    for family, (_, refused) in sorted(families.items()):
        for reason, names in sorted(refused.items()):
            listed = " ".join(sorted(names)[:6]) + (" ..." if len(names) > 6 else "")
            lines.append(f"| {family} | {len(names)} | {reason} | {listed} |")
    return "\n".join(lines) + "\n"


def _family(name: str) -> str:
    return timm.models._registry._model_to_module[name]


def _short(reason: str) -> str:
    """The reason without the layer's path, so that networks of one family share it."""
    first = reason.split("; ")[0].replace("|", "/")
    head, _, tail = first.partition(": ")
    return f"{head.partition(' (')[2].rstrip(')')}: {tail}" if " (" in head and tail else first


if __name__ == "__main__":
    sys.exit(main())
