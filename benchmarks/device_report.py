"""Everything that a GPU can tell about this project, in one command and less than nine minutes.

    PYTHONPATH=. python benchmarks/device_report.py

It needs torch, torchvision, timm and triton; what else is missing is told and done without. The parts are done in
order of importance, each in a process of its own, so that none can take the others with it; only the ceilings, which
come first, are measured here, so that the first step begins soon. A row is written to <name>.jsonl as soon as it is
measured. Whatever no longer fits into the time is listed as skipped, whatever fails is listed with its error. A table
is printed; at the end all rows are kept once more as <name>.json, with a plot. On a CPU it is a smoke test of itself
with tiny networks, whose figures mean nothing.

MFU here: needed FLOPs alone (`spark_fast.reporting.flops`), over the rate of a bf16 matrix product on this device.
"""

from __future__ import annotations

import time

BEGUN = time.time()  # before torch is imported, which takes seconds

import argparse  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from fnmatch import fnmatchcase  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as it is: nothing need be installed

import torch  # noqa: E402
from device_jobs import FULL, TINY, Job, NotHereError  # noqa: E402
from device_parts import PACKAGES, all_parts  # noqa: E402
from measuring import RESULTS, machine, save, versions  # noqa: E402

HERE = "ceilings"  # the part that is measured in this process
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0 where all was measured or skipped, 1 where a part failed."""
    options = _options(argv)
    device = torch.device(options.device)
    if device.type != "cuda":
        torch.set_num_threads(options.threads)
    out: Path = options.rows.parent if options.rows else options.out
    rehearsal = options.tiny or device.type != "cuda"
    parts = all_parts(TINY if rehearsal else FULL, device, out)
    unknown = [p for p in options.only if not any(fnmatchcase(name, p) for name in parts)]
    if unknown:
        print(f"device_report: there is no part {', '.join(unknown)}; there are: {', '.join(parts)}", file=sys.stderr)
        return 2
    only = options.only or ["*"]
    parts = {name: jobs for name, jobs in parts.items() if any(fnmatchcase(name, p) for p in only)}
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    name = options.name or _name(device)
    file: Path = options.rows or out / f"{name}.jsonl"
    if not options.rows:
        file.unlink(missing_ok=True)
    rows: list[Row] = []
    for part, jobs in parts.items():
        if options.rows or device.type != "cuda" or part == HERE:
            rows += measure(part, jobs, deadline, file, options.begun)
        else:
            rows += isolated(part, jobs, options.device, deadline, file, options.begun, options.tiny)
    if not options.rows:
        _keep(rows, out, name, device, rehearsal)
    return int(any("error" in row for row in rows))


def measure(part: str, jobs: list[Job], deadline: float, file: Path, begun: float = BEGUN) -> list[Row]:
    """The rows of `do`, each printed and written to the file as soon as it is measured."""
    rows = []
    for row in do(part, jobs, deadline):
        row["at"] = time.time() - begun  # seconds after the report began
        _write(row, file)
        rows.append(row)
    return rows


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


def isolated(
    part: str, jobs: list[Job], device: str, deadline: float, file: Path, begun: float = BEGUN, tiny: bool = False
) -> list[Row]:
    """As `measure`, in a process of its own, which is ended when the time is up."""
    left = deadline - time.monotonic()
    if left < min(job.needs for job in jobs):
        return measure(part, jobs, deadline, file, begun)  # skips them all
    before = len(_read(file))
    command = [sys.executable, __file__, "--rows", str(file), "--only", part, "--device", device]
    command += ["--seconds", str(left), "--begun", str(begun), *(["--tiny"] if tiny else [])]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=left + 15)
        reason = f"the process ended with code {done.returncode}: {done.stderr[-500:]}"
    except subprocess.TimeoutExpired:
        reason = "it was ended when the time was up"
    rows = _read(file)[before:]
    for job in jobs[len(rows) :]:
        rows.append({"part": part, "name": job.name, "error": reason, "at": time.time() - begun})
        _write(rows[-1], file)
    return rows


def _write(row: Row, file: Path) -> None:
    print(_line(row), flush=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def _read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=found, help="cuda or cpu (%(default)s)")
    parser.add_argument("--seconds", type=float, default=500, help="the time that all parts share (%(default)s)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PART", help="this part, or those of a pattern; may be repeated"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", RESULTS)),
        help="the folder that results are written to; default: $OUT, else %(default)s",
    )  # fmt: skip
    parser.add_argument("--name", default="", help="of the result; default: device_report_<device>_<date>")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="measure in this process, only append rows to FILE")
    parser.add_argument("--tiny", action="store_true", help="tiny networks: a rehearsal; always so on a CPU")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, without a GPU (%(default)s)")
    parser.add_argument("--begun", type=float, default=BEGUN, help=argparse.SUPPRESS)
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
    hidden = ("part", "name", "took", "at", "model", "size", "error", "skipped")
    figures = {k: v for k, v in row.items() if k not in hidden and not isinstance(v, dict)}
    text = "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
    why = {k: " ".join(row[k].split())[:160] for k in ("skipped", "error") if k in row}
    text += "".join(f"{k.upper() if k == 'error' else k}: {v}" for k, v in why.items())
    return f"{row['part']:24} {row['name']:34} {text}"


def _name(device: torch.device) -> str:
    where = machine(device, torch.get_num_threads())
    plain = re.sub(r"[^a-z0-9]+", "_", where["device"].lower()).strip("_")
    return f"device_report_{plain}_{where['date']}"


def _keep(rows: list[Row], out: Path, name: str, device: torch.device, rehearsal: bool) -> None:
    where = machine(device, torch.get_num_threads())
    count = {kind: sum(kind in row for row in rows) for kind in ("skipped", "error")}
    result = {"machine": where, "versions": versions(PACKAGES), "smoke_test": rehearsal, "count": count, "rows": rows}
    print(f"\n{len(rows)} rows, {count['skipped']} skipped, {count['error']} failed; kept in {save(name, result, out)}")
    print(_plot(rows, out / f"{name}.png"))


def _plot(rows: list[Row], path: Path) -> str:
    """Images/s of every way, a group for each network; returns what there is to say."""
    measured = [row for row in rows if "MFU" in row]  # the steps
    if not measured:
        return "no plot: no step was measured"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed"
    shown = list(dict.fromkeys((row["model"], row["size"]) for row in measured))
    figure = Figure(figsize=(10, 1.5 + 0.3 * len(measured)), layout="constrained")
    for axis, network in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        bars = [row for row in measured if (row["model"], row["size"]) == network][::-1]
        drawn = axis.barh([row["name"] for row in bars], [row["images/s"] for row in bars], color="#33658a")
        axis.bar_label(drawn, [f"{row['images/s']:.0f}" for row in bars], padding=3)
        axis.set(
            title=f"{network[0]}, {network[1]} px, mask {bars[0]['mask']}, batch {bars[0]['batch']}",
            xlabel="images/s",
            xmargin=0.1,
        )
    figure.savefig(path, dpi=120)
    return f"plot: {path}"


if __name__ == "__main__":
    sys.exit(main())
