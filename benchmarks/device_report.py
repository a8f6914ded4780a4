"""Everything that a GPU can tell about this project, in one command and less than nine minutes.

    PYTHONPATH=. python benchmarks/device_report.py

It needs torch, torchvision, timm and triton; what else is missing is told and done without. The parts are done in
order of importance, each in a process of its own, so that none can take the others with it. Whatever no longer fits
into the time is listed as skipped, whatever fails is listed with its error. A table is printed; JSON and a plot are
kept as benchmarks/results/device_report_<device>_<date>. On a CPU it is a smoke test of itself with tiny networks,
whose figures mean nothing.

MFU here: needed FLOPs alone (`spark_fast.reporting.flops`), over the rate of a bf16 matrix product on this device.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as it is: nothing need be installed

import torch  # noqa: E402
from device_parts import FULL, TINY, Job, NotHereError, all_parts  # noqa: E402
from measuring import RESULTS, machine, save, versions  # noqa: E402

PACKAGES = ("torch", "torchvision", "timm", "triton", "simplejpeg", "numpy", "nvidia-dali-cuda130", "ffcv")
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0 where all was measured or skipped, 1 where a part failed."""
    options = _options(argv)
    device = torch.device(options.device)
    if device.type != "cuda":
        torch.set_num_threads(options.threads)
    parts = all_parts(FULL if device.type == "cuda" else TINY, device)
    unknown = [name for name in options.only if name not in parts]
    if unknown:
        print(f"device_report: there is no part {', '.join(unknown)}; there are: {', '.join(parts)}", file=sys.stderr)
        return 2
    parts = {name: jobs for name, jobs in parts.items() if not options.only or name in options.only}
    deadline = time.monotonic() + options.seconds
    if options.rows:  # the process of one part
        with options.rows.open("a", encoding="utf-8") as file:
            for name, jobs in parts.items():
                for row in do(name, jobs, deadline):
                    file.write(json.dumps(row) + "\n")
                    file.flush()
        return 0
    rows: list[Row] = []
    for name, jobs in parts.items():
        done = isolated(name, jobs, device, deadline) if device.type == "cuda" else do(name, jobs, deadline)
        for row in done:
            print(_line(row), flush=True)
            rows.append(row)
    _keep(rows, options, device)
    return int(any("error" in row for row in rows))


def do(part: str, jobs: list[Job], deadline: float) -> Iterator[Row]:
    """A row for each job: its figures, or why it was skipped, or its error."""
    for job in jobs:
        row: Row = {"part": part, "name": job.name}
        left = deadline - time.monotonic()
        begun = time.monotonic()
        if left < job.needs:
            row["skipped"] = f"{left:.0f} s are left, it may take {job.needs:.0f}"
        else:
            try:
                row |= job.run()
            except NotHereError as reason:
                row["skipped"] = str(reason)
            except Exception as error:  # whatever it is: the other rows are still wanted
                row["error"] = f"{type(error).__name__}: {error}"
            row["took"] = time.monotonic() - begun
        gc.collect()  # what a failed job held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        yield row


def isolated(part: str, jobs: list[Job], device: torch.device, deadline: float) -> list[Row]:
    """As `do`, in a process of its own, which is ended when the time is up."""
    left = deadline - time.monotonic()
    if left < min(job.needs for job in jobs):
        return list(do(part, jobs, deadline))  # skips them all
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.touch()
        command = [sys.executable, __file__, "--rows", str(path), "--only", part, "--device", str(device)]
        try:
            done = subprocess.run(
                [*command, "--seconds", str(left)], stderr=subprocess.PIPE, text=True, timeout=left + 15
            )
            reason = f"the process ended with code {done.returncode}: {done.stderr[-500:]}"
        except subprocess.TimeoutExpired:
            reason = "it was ended when the time was up"
        rows: list[Row] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return rows + [{"part": part, "name": job.name, "error": reason} for job in jobs[len(rows) :]]


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=found, help="cuda or cpu (%(default)s)")
    parser.add_argument("--seconds", type=float, default=500, help="the time that all parts share (%(default)s)")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="this part; may be given again")
    parser.add_argument("--name", default="", help="of the result; default: device_report_<device>_<date>")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, without a GPU (%(default)s)")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        usable = torch.device(options.device).type
    except RuntimeError:
        usable = ""
    if usable not in ("cuda", "cpu") or (usable == "cuda" and found == "cpu"):
        parser.error(f"--device {options.device}: there is no such device here; take {found}")
    if options.seconds <= 0 or options.threads < 1:
        parser.error("--seconds and --threads must be positive")
    return options


def _line(row: Row) -> str:
    """A row of the table."""
    figures = {k: v for k, v in row.items() if k not in ("part", "name", "took", "model", "size", "error", "skipped")}
    text = "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
    why = {k: " ".join(row[k].split())[:160] for k in ("skipped", "error") if k in row}
    text += "".join(f"{k.upper() if k == 'error' else k}: {v}" for k, v in why.items())
    return f"{row['part']:24} {row['name']:34} {text}"


def _keep(rows: list[Row], options: argparse.Namespace, device: torch.device) -> None:
    where = machine(device, torch.get_num_threads())
    plain = re.sub(r"[^a-z0-9]+", "_", where["device"].lower()).strip("_")
    name = options.name or f"device_report_{plain}_{where['date']}"
    count = {kind: sum(kind in row for row in rows) for kind in ("skipped", "error")}
    smoke = device.type != "cuda"
    result = {"machine": where, "versions": versions(PACKAGES), "smoke_test": smoke, "count": count, "rows": rows}
    print(f"\n{len(rows)} rows, {count['skipped']} skipped, {count['error']} failed; kept in {save(name, result)}")
    print(_plot(rows, RESULTS / f"{name}.png"))


def _plot(rows: list[Row], path: Path) -> str:
    """Images/s of every way, a group for each network; returns what there is to say."""
    measured = [row for row in rows if row["part"].startswith("step ") and "images/s" in row]
    if not measured:
        return "no plot: no step was measured"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed"
    shown = list(dict.fromkeys(row["part"] for row in measured))
    figure = Figure(figsize=(10, 1.5 + 0.3 * len(measured)), layout="constrained")
    for axis, part in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        bars = [row for row in measured if row["part"] == part][::-1]
        drawn = axis.barh([row["name"] for row in bars], [row["images/s"] for row in bars], color="#33658a")
        axis.bar_label(drawn, [f"{row['images/s']:.0f}" for row in bars], padding=3)
        axis.set(title=f"{part}, mask {bars[0]['mask']}, batch {bars[0]['batch']}", xlabel="images/s", xmargin=0.1)
    figure.savefig(path, dpi=120)
    return f"plot: {path}"


if __name__ == "__main__":
    sys.exit(main())
