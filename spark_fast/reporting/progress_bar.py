"""A progress bar as wide as the terminal; where there is little room, the less important columns are left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.measure import measure_renderables
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table

BAR = 10  # columns of a terminal that a bar needs at least


class FittingProgress(Progress):
    """A bar of `rich` over the whole width.

    Args:
        columns: what is shown, from left to right.
        first_left_out: those of them that are left out where there is no room, in this order.
    """

    def __init__(
        self,
        columns: Sequence[ProgressColumn],
        first_left_out: Sequence[ProgressColumn],
        console: Console,
        **kwargs: Any,
    ) -> None:
        self._screen, self._fitting, self.first_left_out = console, tuple(columns), first_left_out
        super().__init__(*columns, console=console, **kwargs)

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """As rich's, with the columns for which there is room."""
        tasks = [task for task in tasks if task.visible]
        needed = {column: self._width(column, tasks) for column in self._fitting}
        room = self._screen.width + 1  # the last column needs no space behind it
        for column in self.first_left_out:
            if sum(needed.values()) + sum(width > 0 for width in needed.values()) > room:
                del needed[column]
        self.columns = tuple(column for column in self._fitting if needed.get(column))
        self.expand = any(isinstance(column, BarColumn) for column in self.columns)  # no gaps without a bar
        return super().make_tasks_table(tasks)

    def _width(self, column: ProgressColumn, tasks: Sequence[Task]) -> int:
        if isinstance(column, BarColumn):
            return BAR
        texts = [column(task) for task in tasks]
        return measure_renderables(self._screen, self._screen.options, texts).maximum if texts else 0


def text(template: str) -> TextColumn:
    """A column of plain text: brackets are printed as they are, not read as markup."""
    return TextColumn(template, markup=False)


def is_live(console: Console) -> bool:
    """Whether a bar can be drawn there: a terminal that can move its cursor, and no file or pipe."""
    return console.is_interactive and console.file.isatty()
