"""Draw what pre-training gained, and write its tables into a page, from benchmarks/results/learning_evidence*.json.

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
from learning_methods import PUBLISHED  # noqa: E402
from learning_report import Found, differences, judgements, results, verdict  # noqa: E402
from learning_table import line, put_tables, spread  # noqa: E402
from learning_table import table as table_of  # noqa: E402
from paired_test import p_value  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "pictures" / "gains.png"
PAGE = ROOT / "docs" / "explanation" / "learning.md"
MARKS = "<!-- gains: the table -->", "<!-- gains: its end -->"
MARKS_OF_FINDINGS = "<!-- findings: the table -->", "<!-- findings: its end -->"
FORMS_SHOWN = {"evidence": "CIFAR-10", "evidence_scans": "generated scans"}
ARMS = {  # those of the picture, and as which they are shown
    "scratch": "from scratch",
    "zero-outing": "SparK, by zero-outing",
    "FCMAE": "FCMAE",
    "as published": "SparK",
}
COLOURS = dict(zip(ARMS, ("0.75", "C1", "C2", "C0"), strict=True))


class Study(NamedTuple):
    """The finished arms of a form: every one has been judged in all ways with all seeds."""

    images: str
    judgements: list[str]
    arms: dict[str, Found]

    def top1(self, arm: str, judgement: str) -> list[float]:
        """Of each seed, in percent."""
        return list(self.arms[arm].by[judgement].values())


def draw_gains(*, folder: Path = RESULTS, out: Path = PICTURE, page: Path = PAGE) -> int:
    """Draw the picture and write the tables.

    Args:
        folder: Where `benchmarks/learning.py` kept its results.
        out: The picture to write, .png.
        page: The page with the marks that the tables are put between.
    """
    if out.suffix != ".png":
        raise SettingsError(f"{out} must end with .png")
    studies = [read_study(folder, form) for form in FORMS_SHOWN]
    picture = draw(studies)
    try:
        put_tables(page, {MARKS: table(studies), MARKS_OF_FINDINGS: findings(studies)})
    except ValueError as error:
        raise SettingsError(str(error)) from None
    with atomic_write(out) as file:
        file.write(picture)
    return 0


def read_study(folder: Path, form: str) -> Study:
    """What `learning.py --form` kept."""
    kept = json.loads((folder / f"learning_{form}.json").read_text(encoding="utf-8"))
    options = Options(data=Path(), out=Path(), form=form, **FORMS[form])
    ways = judgements(options)
    found = results(options, {row["key"]: row for row in [*kept["rows"], *kept["pretrainings"]]})
    whole = {name: arm for name, arm in found.items() if len(arm.mean(ways)) == options.pretrainings}
    return Study(FORMS_SHOWN[form], ways, whole)


def shown(arm: str) -> str:
    """The name of an arm on the page."""
    return ARMS.get(arm, f"SparK, {arm}")


def table(studies: list[Study]) -> str:
    """A line for each arm, means and sample standard deviations; without k-NN, which from scratch is no training."""
    columns = [(study, way) for study in studies for way in study.judgements[1:]]
    lines = []
    for arm in dict.fromkeys([*reversed(ARMS), *(arm for study in studies for arm in study.arms)]):
        cells = (f"{spread(study.top1(arm, way))} %" if arm in study.arms else "" for study, way in columns)
        lines.append(line((shown(arm), *cells)))
    return table_of(("pre-training", *(f"{study.images}, {way}" for study, way in columns)), lines)


def findings(studies: list[Study]) -> str:
    """Of each arm the differences from SparK in percentage points, and what their mean says."""
    lines = []
    for study in studies:
        for arm in study.arms:
            if arm != PUBLISHED:
                each = [spread(differences(study.arms, arm, [way])) for way in study.judgements]
                all_ways = differences(study.arms, arm, study.judgements)
                lines.append(
                    line((study.images, shown(arm), *each, f"{p_value(all_ways):.3f}", verdict(arm, all_ways)))
                )
    return table_of(("images", "minus SparK", *studies[0].judgements, "p of their mean", "finding"), lines)


def draw(studies: list[Study]) -> bytes:
    """The picture: for each way of judging a bar for each arm, with a point for each seed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SettingsError("drawing needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    bars = {}
    for axes, study in zip(figure.subplots(1, len(studies), sharey=True, squeeze=False)[0], studies, strict=True):
        ways, arms = study.judgements[1:], [arm for arm in ARMS if arm in study.arms]
        for number, arm in enumerate(arms):
            places = [i + 0.2 * (number - (len(arms) - 1) / 2) for i in range(len(ways))]
            values = [study.top1(arm, way) for way in ways]
            heights = [statistics.mean(seeds) for seeds in values]
            bars[shown(arm)] = axes.bar(places, heights, 0.19, color=COLOURS[arm])
            for place, seeds in zip(places, values, strict=True):
                axes.plot([place] * len(seeds), seeds, ".", color="black", ms=4)
        axes.set_xlim(-0.5, len(ways) - 0.5)
        axes.set_xticks(range(len(ways)), ways, fontsize=8)
        axes.set_title(study.images, fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("accuracy on the test images, %")
    figure.axes[0].legend(bars.values(), bars.keys(), loc="upper left", fontsize=8)
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
