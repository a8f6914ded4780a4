"""Draw recorded losses of runs that learn and of one that does not, from learning_curves.json beside this file.

    python docs/generate/draw_learning_curves.py      # docs/pictures/learning_curves.png

A run folder's losses are recorded there, every tenth step, by

    python docs/generate/draw_learning_curves.py --record output_my_run --label "AdamW, 0.01"

Needs matplotlib.
"""

from __future__ import annotations

import json
import shlex
import sys
from io import BytesIO
from pathlib import Path

import tyro

from spark_fast.errors import SettingsError, StorageError
from spark_fast.files import atomic_write
from spark_fast.reporting.metrics_file import read_metrics
from spark_fast.reporting.run_summary import NOTHING_LEARNED

CURVES = Path(__file__).with_name("learning_curves.json")
PICTURE = Path(__file__).parents[1] / "pictures" / "learning_curves.png"
EVERY = 10  # steps


def draw_learning_curves(*, out: Path = PICTURE, record: Path | None = None, label: str = "") -> int:
    """Draw the recorded losses, or record those of a run.

    Args:
        out: The picture to write, .png.
        record: A run folder to record.
        label: What the run is called in the picture.
    """
    if out.suffix != ".png":
        raise SettingsError(f"{out} must end with .png")
    curves = read_curves()
    if record is not None:
        head = json.loads((record / "log.txt").read_text(encoding="utf-8").splitlines()[0])
        curves[label or record.name] = {"command": shlex.split(head["cmd"]), "points": points_of(record)}
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(curve)}" for name, curve in curves.items())
        CURVES.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    with atomic_write(out) as file:
        file.write(draw(curves))
    for name, curve in curves.items():
        step, loss = curve["points"][-1]
        print(f"{name}: loss {loss:.3f} after {step} steps")
    return 0


def read_curves() -> dict[str, dict]:
    """Label -> {"command": words, "points": [[step, loss], ...]}."""
    return json.loads(CURVES.read_text(encoding="utf-8")) if CURVES.exists() else {}


def points_of(run: Path) -> list[list[float]]:
    """[step, loss] every tenth step, the loss being the mean since the last."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]  # the others are of evaluations
    found, losses, weights = [], [], []
    before = 0.0
    for row in rows:
        losses.append(row["loss"] * (row["step"] - before))
        weights.append(row["step"] - before)
        before = row["step"]
        if row["step"] % EVERY == 0:
            found.append([int(row["step"]), round(sum(losses) / sum(weights), 4)])
            losses, weights = [], []
    return found


def draw(curves: dict[str, dict]) -> bytes:
    """The picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SettingsError("drawing needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        axes.plot(*zip(*curve["points"], strict=True), label=name)
    axes.axhspan(NOTHING_LEARNED, 1.02, color="red", alpha=0.08, lw=0)
    said = "above: nothing but the mean of each patch "
    axes.annotate(said, (1, NOTHING_LEARNED), xycoords=axes.get_yaxis_transform(), ha="right", va="top", fontsize=8)
    axes.set(xlabel="step", ylabel="loss", ylim=(None, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    try:
        return tyro.cli(draw_learning_curves, args=argv, use_underscores=True, description=__doc__)
    except (SettingsError, StorageError) as error:
        print(f"draw_learning_curves.py: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
