"""benchmarks/README.md lists every kept result with its machine, date and commit."""

import shutil
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tool():
    import results_table

    return results_table


def test_a_result_is_a_line(tool):
    machine = {"device": "a processor", "threads": 2, "torch": "2.14", "date": "2026-12-01", "commit": "abc1234"}
    text = tool.results_table({"a.json": {"machine": machine}})
    assert text.splitlines()[2:] == ["| `a.json` | a processor | 2 | 2.14 | 2026-12-01 | abc1234 |"]


def test_the_page_has_the_table_of_the_kept_results(tool, tmp_path):
    shutil.copy(BENCHMARKS / "README.md", page := tmp_path / "README.md")
    tool.main(page)
    assert page.read_text() == (BENCHMARKS / "README.md").read_text(), "python benchmarks/results_table.py writes it"
