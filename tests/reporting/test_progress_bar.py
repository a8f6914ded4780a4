"""The progress bar fills the terminal, whatever its width, and says the most important where there is little room."""

import io

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn

from spark_fast.reporting.progress_bar import FittingProgress, is_live, text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drawn(width, loss="loss 0.5000", name="[bold]", environment=None):
    """One line, as it stands on a terminal of that width."""
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=True,
        color_system=None,
        _environ=environment or {"TERM": "xterm"},
    )
    columns = text("{task.description}"), BarColumn(None), MofNCompleteColumn(), text("{task.fields[loss]}")
    bar = FittingProgress(columns, (columns[1], columns[3]), console)
    bar.add_task(name, total=20, completed=10, loss=loss)
    console.print(bar.get_renderable())
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_bar_takes_all_the_width_that_there_is(width):
    line = drawn(width)
    assert len(line.rstrip("\n")) == width
    assert line.startswith("[bold] ━"), "brackets of a folder's name are no markup"
    assert line.endswith(" 10/20 loss 0.5000\n")
    assert line.count("━") == (width - len("[bold]  10/20 loss 0.5000")) // 2, "half of it is done"


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (36, "[bold] ━━━━━╸      10/20 loss 0.5000"),
        (35, "[bold] ━━━━━      10/20 loss 0.5000"),
        (34, "[bold] 10/20 loss 0.5000"),
        (24, "[bold] 10/20 loss 0.5000"),
        (23, "[bold] 10/20"),
        (12, "[bold] 10/20"),
    ],
)
def test_where_there_is_little_room_the_less_important_is_left_out(width, line):
    assert drawn(width).rstrip("\n") == line


def test_a_column_without_a_figure_yet_takes_no_room():
    assert drawn(80, loss="").endswith(" 10/20\n")
    assert len(drawn(80, loss="")) == 81


def test_columns_says_the_width_even_an_absurd_one():
    assert len(drawn(None, environment={"COLUMNS": "57"}).rstrip("\n")) == 57
    assert drawn(None, environment={"COLUMNS": "0"}).strip() == ""


def test_a_bar_is_drawn_on_a_terminal_that_can_move_its_cursor_alone():
    assert is_live(Console(file=Terminal(), _environ={"TERM": "xterm"}))
    assert not is_live(Console(file=Terminal(), _environ={"TERM": "dumb"}))
    assert not is_live(Console(file=io.StringIO(), _environ={"TERM": "xterm"}))
    assert not is_live(Console(file=io.StringIO(), _environ={"TERM": "xterm", "FORCE_COLOR": "1"})), "a file stays one"
