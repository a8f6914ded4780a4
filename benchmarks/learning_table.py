"""The table of `learning.py`: means and standard deviations over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spark_fast.files import atomic_write

MARKS = ("<!-- learning: the table -->", "<!-- learning: its end -->")


def markdown(rows: list[dict[str, Any]], seconds: dict[int, float], width: int) -> str:
    """The tables of whatever parts were run.

    Args:
        rows: of the fine-tunings.
        seconds: decoder width -> seconds of a step.
        width: the decoder's, where nothing else is said.
    """
    arms: dict[tuple[str, float, str, float], list[float]] = {}
    for row in rows:
        run = row["run"]
        arms.setdefault((run["network"], run["share"], row["arm"], run["lr"]), []).append(row["top1"])
    parts = (_main(arms), _changes(arms, seconds, width), _sweep(arms))
    return "\n".join(part for part in parts if part)


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def table(titles: Iterable[str], lines: list[str]) -> str:
    """A table, or nothing where it would have no lines."""
    titles = tuple(titles)
    return "\n".join([line(titles), line("---" for _ in titles), *lines, ""]) if lines else ""


def line(cells: Iterable[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def put_between_marks(page: Path, text: str, marks: tuple[str, str] = MARKS) -> None:
    """Put a table into a page between two marks; as `put_tables`."""
    put_tables(page, {marks: text})


def put_tables(page: Path, tables: Mapping[tuple[str, str], str]) -> None:
    """Put each table into a page between its two marks, in place of the one before: all of them or none.

    Raises:
        ValueError: the page has not each mark once.
    """
    content = page.read_text(encoding="utf-8")
    for marks, text in tables.items():
        before, begin, rest = content.partition(marks[0])
        _, end, after = rest.partition(marks[1])
        if not (begin and end):
            raise ValueError(f"{page} needs the two marks {marks[0]} and {marks[1]}")
        content = f"{before}{begin}\n\n{text}\n{end}{after}"
    with atomic_write(page) as file:
        file.write(content.encode())


def _main(arms: dict) -> str:
    lines = []
    for network, share in dict.fromkeys((n, s) for n, s, *_ in arms):
        found = {arm: values for (n, s, arm, _), values in arms.items() if (n, s) == (network, share)}
        if "scratch" not in found or "pre-trained" not in found:
            continue
        gains = [b - a for a, b in zip(found["scratch"], found["pre-trained"], strict=True)]
        cells = (spread(found["scratch"]), spread(found["pre-trained"]), spread(gains))
        lines.append(line((network, f"{share:.0%}", *cells)))
    return table(("network", "labels", "scratch", "pre-trained", "gain"), lines)


def _changes(arms: dict, seconds: dict[int, float], width: int) -> str:
    lines = []
    for (_, _, arm, _), values in arms.items():
        if arm.split()[0] in ("scratch", "pre-trained"):
            continue
        of = int(arm.removeprefix("decoder ")) if arm.startswith("decoder ") else width
        label = f"{arm} (mask 0.6, decoder {width})" if arm == "as published" else arm
        step = f"{1000 * seconds[of]:.0f}" if of in seconds and (of != width or arm == "as published") else ""
        lines.append(line((label, spread(values), step)))
    return table(("pre-training", "top-1", "ms per step"), lines)


def _sweep(arms: dict) -> str:
    swept = [(key, values) for key, values in arms.items() if key[2].endswith(" swept")]
    lines = [line((n, f"{s:.0%}", a.removesuffix(" swept"), f"{lr:g}", spread(v))) for (n, s, a, lr), v in swept]
    return table(("network", "labels", "arm", "learning rate", "held-out top-1"), lines)
