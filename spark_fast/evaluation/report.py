"""The output of an evaluation: result.json, a picture of the confusion matrix, lines of metrics, printed lines."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from spark_fast.evaluation.accuracy import Confusion
from spark_fast.files import atomic_write
from spark_fast.reporting.metrics_file import MetricsFile, line_of
from spark_fast.run.run_folder import RESULT
from spark_fast.versions import versions

log = logging.getLogger("spark_fast")

PICTURE = "confusion.png"
NAMED = 40  # classes up to which the picture names them
DRAWN = 1000  # rows of the picture at most


class Report:
    """Writes into a folder; on ranks other than the first (folder None) it does nothing.

    Args:
        step: where this process begins.
    """

    def __init__(self, folder: Path | None, step: int = 0) -> None:
        self.folder = folder
        self._metrics = None if folder is None else MetricsFile(folder / "metrics.jsonl", step)

    def point(self, step: int, text: str, **row: object) -> None:
        """A row of metrics, and what is printed of it."""
        if self._metrics is not None:
            self._metrics.point({"step": step, **row}, step)
            print(text, flush=True)

    def epoch(self, step: int, text: str, **row: object) -> None:
        """The same at the end of an epoch; log.txt has a line of it, too."""
        self.point(step, text, **row)
        if self.folder is not None:
            with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
                file.write(line_of({"step": step, **row}))

    def result(self, confusion: Confusion, classes: list[str], **row: object) -> None:
        """Write result.json and the picture.

        Args:
            classes: their names, [] when not known.
            row: what was measured, and how.
        """
        if self.folder is None:
            return
        counts = zip(confusion.right.tolist(), confusion.images.tolist(), strict=True)
        of_class = [100 * right / images if images else None for right, images in counts]
        content = {**row, "accuracy_of_class": of_class, "classes": classes, "versions": versions()}
        text = json.dumps(content, indent=1) + "\n"
        with atomic_write(self.folder / RESULT) as file:
            file.write(text.encode())
        draw_confusion(confusion, classes, self.folder / PICTURE)
        print(f"top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %; everything is in {self.folder}/", flush=True)

    def close(self) -> None:
        """Close the files."""
        if self._metrics is not None:
            self._metrics.close()


def draw_confusion(confusion: Confusion, classes: list[str], path: Path) -> None:
    """Each row as shares of that class's images; with names where there are few classes, an image alone otherwise."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no %s, as matplotlib is not installed: pip install 'spark-fast[plots]'", path.name)
        return
    count = confusion.classes
    matrix = confusion.matrix(min(count, DRAWN))
    shares = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    few = count <= NAMED
    side = max(4.0, 0.3 * count) if few else 8.0
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="magma", interpolation="nearest")
    together = f" (of {count} classes in {DRAWN} groups, in their order)" if count > DRAWN else ""
    axes.set(xlabel=f"taken for{together}", ylabel="is")
    if few:
        names = classes or [str(i) for i in range(count)]
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
    figure.colorbar(image, label="share of the class's images", shrink=0.8)
    figure.savefig(path, dpi=max(100, len(matrix) // 6))
