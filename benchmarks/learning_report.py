"""The tables and the picture of benchmarks/README.md, from the runs of `learning.py --form evidence` that are finished.

    python benchmarks/learning_report.py --out /tmp/learning --write benchmarks/README.md --picture accuracy.png

It works on a part of the runs, too, and says how many there are. The picture needs matplotlib.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import learning_plan
import tyro
from learning_forms import FORMS, Options
from learning_methods import PUBLISHED
from learning_plan import FCMAE, FCMAE_4, SAME_SECONDS, SCRATCH, STEPS, Arm, Rows, arms, expected, last_knn, plan
from learning_queue import read_rows
from learning_table import line, put_between_marks, spread, table
from paired_test import LEVEL, detectable, p_value, pairs_needed

from spark_fast.files import atomic_write

KNN = "k-NN"
# what the paper found of each change against the method as published (Tian et al., ICLR 2023)
WORSE_IN_THE_PAPER = (SCRATCH, "zero-outing", "no hierarchy", "loss on all patches", "mask 0.25", "mask 0.9")


@dataclass
class Report:
    """What to write from which runs."""

    out: Path
    """the folder of `learning.py`"""
    form: str = "evidence"
    """the form that it was run with"""
    write: Path | None = None
    """a page, into which the tables are put between their marks"""
    picture: Path | None = None
    """a .png: k-NN against seconds of training"""


@dataclass
class Found:
    """The results of one arm: judgement -> seed of the pre-training -> percent."""

    arm: Arm
    by: dict[str, dict[int, float]] = field(default_factory=dict)

    def mean(self, judgements: list[str]) -> dict[int, float]:
        """Of each seed that has been judged in all ways."""
        seeds = [seed for seed in self.by.get(judgements[0], {}) if all(seed in self.by.get(j, {}) for j in judgements)]
        return {seed: statistics.mean(self.by[j][seed] for j in judgements) for seed in seeds}


def marks(form: str) -> tuple[str, str]:
    """The two lines of a page between which a form's tables stand."""
    return f"<!-- {form}: the tables -->", f"<!-- {form}: their end -->"


def markdown(options: Options, rows: Rows) -> str:
    """All tables."""
    found = results(options, rows)
    done = sum(job.key in rows for job in plan(options, rows))
    text = f"{done} of {expected(options)} runs are in."
    if STEPS in rows:
        cost = {name: f"{1000 * seconds:.0f} ms" for name, seconds in rows[STEPS]["of"].items()}
        text += f" A step takes {', '.join(f'{name} {ms}' for name, ms in cost.items())}, its batch included."
    parts = (_main(options, found), _times(options, rows, found), _differences(options, found), _rates(options, rows))
    return "\n\n".join([text, *(part.rstrip() for part in parts if part)]) + "\n"


def results(options: Options, rows: Rows) -> dict[str, Found]:
    """Of every arm, in the order of the plan; more than one fine-tuning of a pre-training counts as their mean."""
    found = {arm.name: Found(arm) for group in arms(options) for arm in group}
    tuned: dict[tuple[str, str, int], list[float]] = {}
    for job in plan(options, rows):
        name = job.about.get("arm", "")
        if job.key not in rows or name not in found:
            continue
        row = rows[job.key]
        if job.does == "pretrain":
            found[name].by.setdefault(KNN, {})[job.run.seed] = last_knn(row)
            if name == PUBLISHED:  # before its first step
                found[SCRATCH].by.setdefault(KNN, {})[job.run.seed] = row["knn"][0][1]
        else:
            seed = job.run.seed % options.pretrainings
            tuned.setdefault((name, labels(job.run.share), seed), []).append(row["top1"])
    for (name, judgement, seed), values in tuned.items():
        found[name].by.setdefault(judgement, {})[seed] = statistics.mean(values)
    return found


def labels(share: float) -> str:
    """The title of a share of labels."""
    return f"{share:.0%} of the labels"


def judgements(options: Options) -> list[str]:
    """The ways in which every pre-training is judged."""
    return [KNN, *map(labels, options.shares)]


def differences(found: dict[str, Found], arm: str, by: list[str]) -> list[float]:
    """Of an arm and the method as published, seed by seed, each the mean over these judgements."""
    ours, published = found[arm].mean(by), found[PUBLISHED].mean(by)
    return [ours[seed] - published[seed] for seed in sorted(ours) if seed in published]


def verdict(arm: str, values: list[float]) -> str:
    """What the differences of an arm say of the paper's direction, or which is better where it has none."""
    if p_value(values) >= LEVEL:
        return "open"
    lower = statistics.mean(values) < 0
    if arm in WORSE_IN_THE_PAPER:
        return "confirmed" if lower else "refuted"
    return "worse" if lower else "better"


def _main(options: Options, found: dict[str, Found]) -> str:
    ways, lines = judgements(options), []
    for name, of_arm in found.items():
        if not of_arm.by:
            continue
        cells = [spread(list(of_arm.by[way].values())) if way in of_arm.by else "" for way in ways]
        values = differences(found, name, ways) if name != PUBLISHED else []
        beside = (
            (f"{spread(values)}", f"{p_value(values):.3f}", verdict(name, values)) if len(values) > 1 else ("",) * 3
        )
        paper = "worse" if name in WORSE_IN_THE_PAPER else ""
        lines.append(line((name, *cells, *beside, paper)))
    return table(("pre-training", *ways, "minus as published", "p", "finding", "in the paper"), lines)


def _times(options: Options, rows: Rows, found: dict[str, Found]) -> str:
    if STEPS not in rows:
        return ""
    lines = []
    for name in (PUBLISHED, FCMAE, FCMAE + SAME_SECONDS, FCMAE_4, FCMAE_4 + SAME_SECONDS):
        if name not in found:
            continue
        of_arm, by = found[name].arm, found[name].by
        same = learning_plan.passes(options, rows, of_arm.tuned_as)
        epochs = same if of_arm.same_seconds and same else options.epochs
        curves = _curves(options, rows, name)
        if not curves:
            continue
        minutes = f"{curves[0][-1][0] / 60:.0f}"
        cells = (spread(list(by[way].values())) if way in by else "" for way in judgements(options))
        lines.append(line((name.removesuffix(SAME_SECONDS), str(epochs), minutes, *cells)))
    return table(("method", "passes", "minutes", *judgements(options)), lines)


def _differences(options: Options, found: dict[str, Found]) -> str:
    lines, ways = [], judgements(options)
    for name in found:
        for title, by in [(way, [way]) for way in ways] + [("mean of them", ways)]:
            values = differences(found, name, by)
            if name == PUBLISHED or len(values) < 2:
                continue
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            needed = pairs_needed(mean, deviation)
            power = (f"{detectable(len(values)) * deviation:.1f}", f"{needed:g}" if needed <= 100 else "over 100")
            lines.append(line((name, title, f"{mean:+.2f} ± {deviation:.2f}", f"{p_value(values):.3f}", *power)))
    titles = ("pre-training", "judged by", "minus as published", "p", "would be found", "seeds for what was seen")
    return table(titles, lines)


def _rates(options: Options, rows: Rows) -> str:
    tried: dict[tuple[str, str], dict[float, float]] = {}
    for job in plan(options, rows):
        what, _, kind = job.about.get("arm", "").rpartition(" ")
        if job.key in rows and kind == "tuned":
            tried.setdefault((what, "pre-training, k-NN"), {})[job.run.lr] = last_knn(rows[job.key])
        elif job.key in rows and kind == "swept":
            tried.setdefault((what, labels(job.run.share)), {})[job.run.lr] = rows[job.key]["top1"]
    rates = sorted({rate for of_rate in tried.values() for rate in of_rate})
    lines = []
    for key, of_rate in tried.items():
        best = max(of_rate, key=lambda rate: (of_rate[rate], -rate))
        shown = (f"{of_rate[rate]:.2f}" if rate in of_rate else "" for rate in rates)
        lines.append(
            line((*key, *(f"**{text}**" if r == best else text for r, text in zip(rates, shown, strict=True))))
        )
    return table(("arm", "judged on held-out images by", *(f"rate {rate:g}" for rate in rates)), lines)


def _curves(options: Options, rows: Rows, arm: str) -> list[list[tuple[float, float]]]:
    """Of each seed, (seconds of training, k-NN) along the run."""
    per_step = rows[STEPS]["of"].get(arm.removesuffix(SAME_SECONDS))
    jobs = [job for job in plan(options, rows) if job.does == "pretrain" and job.about["arm"] == arm]
    return [[(step * per_step, top1) for step, top1 in rows[job.key]["knn"]] for job in jobs if job.key in rows]


def draw(options: Options, rows: Rows, path: Path) -> None:
    """k-NN against seconds of training: a line for each run, a dot where it ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, method in enumerate((PUBLISHED, FCMAE, FCMAE_4)):
        colour, shown = f"C{number}", "SparK" if method == PUBLISHED else method
        for name, style in ((method, "-"), (method + SAME_SECONDS, "--")):
            for curve in _curves(options, rows, name) if STEPS in rows else ():
                minutes, top1 = [seconds / 60 for seconds, _ in curve], [value for _, value in curve]
                axes.plot(minutes, top1, style, color=colour, lw=1, alpha=0.7, label=shown)
                axes.plot(minutes[-1:], top1[-1:], "o", color=colour)
                shown = "_nolegend_"
    axes.set(xlabel="minutes of training on one core", ylabel="k-NN top-1, %")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="lower right")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def main(report: Report) -> None:
    """Print the tables, put them into a page, draw the picture."""
    values: dict[str, Any] = FORMS[report.form]
    options, rows = (
        Options(data=Path(), out=report.out, form=report.form, **values),
        read_rows(report.out / "runs.jsonl"),
    )
    text = markdown(options, rows)
    print(text)
    if report.write:
        put_between_marks(report.write, text, marks(report.form))
    if report.picture:
        draw(options, rows, report.picture)


if __name__ == "__main__":
    main(tyro.cli(Report, description=__doc__, use_underscores=True))
