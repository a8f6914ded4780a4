"""Draw what pre-training gained on CIFAR-10, and write its table into a page, from benchmarks/results/learning.json.

    python docs/generate/draw_gains.py      # docs/pictures/gains.png, docs/explanation/learning.md

Needs matplotlib.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import tyro

from spark_fast.errors import SettingsError, StorageError
from spark_fast.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from learning_table import line, put_between_marks  # noqa: E402
from learning_table import table as table_of  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "learning.json"
PICTURE = ROOT / "docs" / "pictures" / "gains.png"
PAGE = ROOT / "docs" / "explanation" / "learning.md"
MARKS = "<!-- gains: the table -->", "<!-- gains: its end -->"
ARMS = {"scratch": "from scratch", "pre-trained": "pre-trained"}
SHOWN = {"small_resnet": "small ResNet", "small_convnext": "small ConvNeXt"}


class Case(NamedTuple):
    """A network fine-tuned with a share of the labels: top-1 of each seed, in percent."""

    network: str
    share: float
    scratch: list[float]
    pretrained: list[float]

    @property
    def gains(self) -> list[float]:
        """Points, seed by seed."""
        return [after - before for before, after in zip(self.scratch, self.pretrained, strict=True)]


def draw_gains(*, result: Path = RESULT, out: Path = PICTURE, page: Path = PAGE) -> int:
    """Draw the picture and write the table.

    Args:
        result: What `benchmarks/learning.py` kept.
        out: The picture to write, .png.
        page: The page with the two marks that the table is put between.
    """
    if out.suffix != ".png":
        raise SettingsError(f"{out} must end with .png")
    cases = read_cases(result)
    picture = draw(cases)
    try:
        put_between_marks(page, table(cases), MARKS)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    with atomic_write(out) as file:
        file.write(picture)
    return 0


def read_cases(result: Path) -> list[Case]:
    """Those of which both arms are there, by network and share."""
    found: dict[tuple[str, float], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in json.loads(result.read_text(encoding="utf-8"))["rows"]:
        if row["arm"] in ARMS:
            run = row["run"]
            found[run["network"], run["share"]][row["arm"]][run["seed"]] = row["top1"]
    cases = []
    for (network, share), arms in found.items():
        if len(arms) == len(ARMS):
            scratch, pretrained = ([values for _, values in sorted(arms[arm].items())] for arm in ARMS)
            cases.append(Case(network, share, scratch, pretrained))
    return sorted(cases, key=lambda case: (list(SHOWN).index(case.network), case.share))


def table(cases: list[Case]) -> str:
    """Means over the seeds; the gain with its sample standard deviation."""
    lines = []
    for case in cases:
        means = (f"{statistics.mean(values):.1f} %" for values in (case.scratch, case.pretrained))
        gain = f"{statistics.mean(case.gains):+.1f} ± {statistics.stdev(case.gains):.1f} points"
        lines.append(line((SHOWN[case.network], f"{case.share:.0%}", *means, gain)))
    return table_of(("network", "labels used", *ARMS.values(), "gain"), lines)


def draw(cases: list[Case]) -> bytes:
    """The picture: two bars for each case, a point for each seed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SettingsError("drawing needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    networks = list(dict.fromkeys(case.network for case in cases))
    for axes, network in zip(figure.subplots(1, len(networks), sharey=True, squeeze=False)[0], networks, strict=True):
        own = [case for case in cases if case.network == network]
        for number, label in enumerate(ARMS.values()):
            values = [(case.scratch, case.pretrained)[number] for case in own]
            places = [i + 0.4 * number - 0.2 for i in range(len(own))]
            axes.bar(places, [statistics.mean(v) for v in values], 0.38, color=("0.75", "C0")[number], label=label)
            for place, seeds in zip(places, values, strict=True):
                axes.plot([place] * len(seeds), seeds, ".", color="black", ms=4)
        axes.set_xticks(range(len(own)), [f"{case.share:.0%} of the labels" for case in own], fontsize=8)
        axes.set_title(SHOWN[network], fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("accuracy on the test images, %")
    figure.axes[0].legend(loc="upper left", fontsize=8)
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
