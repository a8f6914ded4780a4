"""Draw loss, learning rate, throughput, data wait and, if it was measured, k-NN accuracy of runs as one PNG.

    spark-fast-plot output_my_run output_other --out runs.png

Reads metrics.jsonl of each run folder, also while it is training. Needs matplotlib. Exit codes: 0 done, 2 settings,
6 storage.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Annotated

import tyro

from spark_fast.cli.start import start
from spark_fast.cli.tool import run_tool
from spark_fast.errors import SettingsError
from spark_fast.files import atomic_write
from spark_fast.reporting.metrics_file import read_metrics

PANELS = {  # key of a row -> title
    "loss": "loss",
    "lr": "learning rate",
    "images_per_second": "images per second",
    "data_wait": "share of time waiting for data",
}
EVALUATED = {"knn_top1": "k-NN top-1, percent"}  # panels beside them, where a run has such rows
FLAT = 0.01  # the loss axis spans at least this


def plot_run(
    runs: Annotated[list[Path], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")],
    *,
    out: Path = Path("runs.png"),
) -> int:
    """Draw loss, learning rate, throughput, data wait and, if it was measured, k-NN accuracy of runs as one PNG.

    Args:
        runs: Run folders, or metrics.jsonl files.
        out: The picture to write, .png.
    """
    if out.suffix != ".png":
        raise SettingsError(f"{out} must end with .png")
    if not runs:
        raise SettingsError("one or more run folders are needed")
    curves = {str(run): _rows(run) for run in runs}
    picture = draw(curves)
    with atomic_write(out) as file:
        file.write(picture)
    for name, rows in curves.items():
        points = [row for row in rows if "loss" in row]
        knn = [f", k-NN top-1 {row['knn_top1']:.2f} %" for row in rows if "knn_top1" in row]
        last = f"to step {points[-1]['step']}, loss {points[-1]['loss']:.4f}{knn[-1] if knn else ''}"
        print(f"{name}: {len(points)} log points {last}")
    print(f"{out}: {', '.join(_panels(curves).values())}")
    return 0


def draw(curves: Mapping[str, Sequence[dict[str, float]]]) -> bytes:
    """A PNG with a panel for each of PANELS, and of EVALUATED that is there; a line for each run, over the steps."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise SettingsError("drawing needs matplotlib: pip install matplotlib") from None
    panels = _panels(curves)
    columns = (len(panels) + 1) // 2
    figure = Figure(figsize=(1 + 5 * columns, 7), layout="constrained")
    axes = dict(zip(panels, figure.subplots(2, columns, sharex=True).flat, strict=False))
    for unused in figure.axes[len(panels) :]:
        unused.remove()
    for key, panel in axes.items():
        for number, (name, rows) in enumerate(curves.items()):
            points = {row["step"]: row[key] for row in rows if key in row}
            marker = "." if len(points) < 30 else ""
            panel.plot(list(points), list(points.values()), label=name, marker=marker, color=f"C{number}")
        panel.set_title(panels[key])
        panel.grid(alpha=0.3)
        panel.ticklabel_format(axis="y", useOffset=False)  # an axis reads 0.999, not 0.001 and "+1" above it
        panel.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
    low, high = axes["loss"].get_ylim()
    if high - low < FLAT:  # noise of the last digit is drawn as what it is
        axes["loss"].set_ylim((low + high - FLAT) / 2, (low + high + FLAT) / 2)
    for panel in figure.axes[columns:]:
        panel.set_xlabel("step")
    axes["data_wait"].set_ylim(0, 1)
    figure.legend(*axes["loss"].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _rows(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl" if run.is_dir() else run
    try:
        rows = read_metrics(path)
    except OSError as error:
        raise SettingsError(f"{run} is not a run folder: {path} cannot be read ({error.strerror})") from None
    if any("loss" not in row and "eval_seconds" not in row for row in rows):
        raise SettingsError(f"{path} is not the metrics.jsonl of a pre-training run: it has rows without a loss")
    if not any("loss" in row for row in rows):
        raise SettingsError(f"{path} has no log point yet")
    return rows


def _panels(curves: Mapping[str, Sequence[dict[str, float]]]) -> dict[str, str]:
    there = {key for rows in curves.values() for row in rows for key in row}
    return PANELS | {key: title for key, title in EVALUATED.items() if key in there}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_tool("plot", plot_run, argv)


if __name__ == "__main__":
    sys.exit(start("plot"))
