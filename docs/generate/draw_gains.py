"""Draw what pre-training gained, and write its table into a page, from benchmarks/results/learning_evidence*.json.

    python docs/generate/draw_gains.py      # docs/pictures/gains.png, docs/explanation/learning.md

Needs matplotlib.
"""

from __future__ import annotations

import json
import statistics
import sys
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import tyro

from spark_fast.errors import SettingsError, StorageError
from spark_fast.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from learning_forms import FORMS, Options  # noqa: E402
from learning_report import judgements, results  # noqa: E402
from learning_table import line, put_between_marks  # noqa: E402
from learning_table import table as table_of  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "pictures" / "gains.png"
PAGE = ROOT / "docs" / "explanation" / "learning.md"
MARKS = "<!-- gains: the table -->", "<!-- gains: its end -->"
FORMS_SHOWN = {"evidence": "CIFAR-10", "evidence_scans": "generated scans"}
ARMS = {  # those of the picture, and as which they are shown
    "scratch": "from scratch",
    "zero-outing": "SparK, by zero-outing",
    "FCMAE": "FCMAE",
    "as published": "SparK",
}
COLOURS = ("0.75", "C1", "C2", "C0")


class Case(NamedTuple):
    """Images, and how a network is judged on them; of each arm the top-1 of each seed, in percent."""

    images: str
    judgement: str
    arms: dict[str, list[float]]


def draw_gains(*, folder: Path = RESULTS, out: Path = PICTURE, page: Path = PAGE) -> int:
    """Draw the picture and write the table.

    Args:
        folder: Where `benchmarks/learning.py` kept its results.
        out: The picture to write, .png.
        page: The page with the two marks that the table is put between.
    """
    if out.suffix != ".png":
        raise SettingsError(f"{out} must end with .png")
    cases = [case for form in FORMS_SHOWN for case in read_cases(folder, form)]
    picture = draw(cases)
    try:
        put_between_marks(page, table(cases), MARKS)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    with atomic_write(out) as file:
        file.write(picture)
    return 0


def read_cases(folder: Path, form: str) -> list[Case]:
    """Those of a form, with the arms that every seed of is there; k-NN is left out, for scratch is no training."""
    kept = json.loads((folder / f"learning_{form}.json").read_text(encoding="utf-8"))
    options = Options(data=Path(), out=Path(), form=form, **FORMS[form])
    found = results(options, {row["key"]: row for row in [*kept["rows"], *kept["pretrainings"]]})
    cases = []
    for judgement in judgements(options)[1:]:
        seeds = {name: of_arm.by.get(judgement, {}) for name, of_arm in found.items()}
        whole = {name: list(s.values()) for name, s in seeds.items() if len(s) == options.pretrainings}
        cases.append(Case(FORMS_SHOWN[form], judgement, {name: whole[name] for name in whole}))
    return cases


def table(cases: list[Case]) -> str:
    """A line for each arm, in the order of the picture and then of the plan; means and sample standard deviations."""
    names = dict.fromkeys([*reversed(ARMS), *(name for case in cases for name in case.arms)])
    lines = []
    for name in names:
        values = [case.arms.get(name) for case in cases]
        if any(values):
            cells = (f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f} %" if v else "" for v in values)
            lines.append(line((ARMS.get(name, f"SparK, {name}"), *cells)))
    return table_of(("pre-training", *(f"{case.images}, {case.judgement}" for case in cases)), lines)


def draw(cases: list[Case]) -> bytes:
    """The picture: for each case a bar for each arm, with a point for each seed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SettingsError("drawing needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    images = list(dict.fromkeys(case.images for case in cases))
    width = 0.8 / len(ARMS)
    for axes, name in zip(figure.subplots(1, len(images), sharey=True, squeeze=False)[0], images, strict=True):
        own = [case for case in cases if case.images == name]
        for number, (arm, label) in enumerate(ARMS.items()):
            for i, case in enumerate(own):
                if arm not in case.arms:
                    continue
                place, seeds = i + width * (number - (len(ARMS) - 1) / 2), case.arms[arm]
                bar = axes.bar(place, statistics.mean(seeds), 0.95 * width, color=COLOURS[number])
                bar.set_label(label if i == 0 else "_nolegend_")
                axes.plot([place] * len(seeds), seeds, ".", color="black", ms=4)
        axes.set_xticks(range(len(own)), [case.judgement for case in own], fontsize=8)
        axes.set_title(name, fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("accuracy on the test images, %")
    figure.axes[-1].legend(loc="upper left", fontsize=8)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    try:
        return tyro.cli(draw_gains, args=argv, use_underscores=True, description=__doc__)
    except (SettingsError, StorageError) as error:
        print(f"draw_gains.py: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
