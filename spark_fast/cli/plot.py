"""Draw loss, learning rate, throughput and data wait of runs, as one PNG.

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
FLAT = 0.01  # the loss axis spans at least this


def plot_run(
    runs: Annotated[list[Path], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")],
    *,
    out: Path = Path("runs.png"),
) -> int:
    """Draw loss, learning rate, throughput and data wait of runs, as one PNG.

    Args:
        runs: Run folders, or metrics.jsonl files.
        out: The picture to write, .png.
    """
    if out.suffix != ".png":
        raise SettingsError(f"{out} must end with .png")
    if not runs:
        raise SettingsError("give one run folder or more")
    curves = {str(run): _rows(run) for run in runs}
    picture = draw(curves)
    with atomic_write(out) as file:
        file.write(picture)
    for name, rows in curves.items():
        print(f"{name}: {len(rows)} log points to step {rows[-1]['step']}, loss {rows[-1]['loss']:.4f}")
    print(f"{out}: {', '.join(PANELS.values())}")
    return 0


def draw(curves: Mapping[str, Sequence[dict[str, float]]]) -> bytes:
    """A PNG with a panel for each of PANELS and a line for each run, over the steps."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise SettingsError("drawing needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for panel, (key, title) in zip(axes.flat, PANELS.items(), strict=True):
        for name, rows in curves.items():
            points = [(row["step"], row[key]) for row in rows if key in row]
            panel.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else "")
        panel.set_title(title)
        panel.grid(alpha=0.3)
        panel.ticklabel_format(axis="y", useOffset=False)  # an axis reads 0.999, not 0.001 and "+1" above it
        panel.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
    low, high = axes[0, 0].get_ylim()
    if high - low < FLAT:  # noise of the last digit is drawn as what it is
        axes[0, 0].set_ylim((low + high - FLAT) / 2, (low + high + FLAT) / 2)
    for panel in axes[1]:
        panel.set_xlabel("step")
    axes[1, 1].set_ylim(0, 1)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _rows(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl" if run.is_dir() else run
    try:
        rows = read_metrics(path)
    except OSError as error:
        raise SettingsError(f"{run} is no run folder: {path} cannot be read ({error.strerror})") from None
    if not rows:
        raise SettingsError(f"{path} has no log point yet")
    if any("loss" not in row for row in rows):
        raise SettingsError(f"{path} is no metrics.jsonl of a pre-training run: it has rows without a loss")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_tool("plot", plot_run, argv)


if __name__ == "__main__":
    sys.exit(start("plot"))
