"""The tables of the evidence, from made-up runs whose differences are known."""

import pytest

from tests.benchmarks.test_learning_plan import finish, learning_plan, options  # noqa: F401


@pytest.fixture
def report(learning_plan):  # noqa: F811
    import learning_report

    return learning_report


@pytest.fixture
def rows(learning_plan, options):  # noqa: F811
    found = {}
    finish(learning_plan, options, found)
    return found


def cells(text, *begin):
    """Of the first line of a table that begins so."""
    line = next(line for line in text.splitlines() if line.startswith("| " + " | ".join(begin) + " |"))
    return [cell.strip() for cell in line.strip("|").split("|")][len(begin) :]


def test_each_arm_has_its_means_and_is_compared_seed_by_seed(report, options, rows):  # noqa: F811
    text = report.markdown(options, rows)
    assert text.startswith(f"{len(rows)} of {len(rows)} runs are in. A step takes as published 400 ms, FCMAE 200 ms")
    assert cells(text, "as published") == ["42.00 ± 1.00", "52.00 ± 1.00", "62.00 ± 1.00", "", "", "", ""]
    assert cells(text, "zero-outing")[:3] == ["39.00 ± 1.00", "52.00 ± 1.00", "62.00 ± 1.00"]
    assert cells(text, "zero-outing")[3:] == ["-1.00 ± 0.00", "0.000", "confirmed", "worse"]
    assert cells(text, "scratch")[0] == "26.00 ± 1.00", "k-NN before the first step"
    assert cells(text, "mask 0.25")[-2:] == ["open", "worse"]
    assert cells(text, "zero-outing", "k-NN")[0] == "-3.00 ± 0.00"


def test_at_equal_passes_and_at_equal_seconds(report, options, rows):  # noqa: F811
    lines = [line for line in report.markdown(options, rows).splitlines() if line.startswith("| FCMAE | ")]
    passes = [[cell.strip() for cell in line.split("|")][2:4] for line in lines]
    assert ["10", "13"] in passes, "minutes: 3900 steps of 0.2 s"
    assert ["20", "26"] in passes


def test_the_tuning_is_shown_with_the_chosen_rate(report, options, rows):  # noqa: F811
    text = report.markdown(options, rows).partition("| arm | judged on held-out images by |")[2]
    assert cells(text, "FCMAE", "pre-training, k-NN") == ["43.00", "**44.00**", "", "43.00"]
    assert cells(text, "scratch", "1% of the labels") == ["48.00", "", "**49.00**", "48.00"]


def test_a_difference_the_other_way_refutes_and_one_pair_says_nothing(report):
    assert report.verdict("zero-outing", [1.0, 1.1, 0.9]) == "refuted"
    assert report.verdict("zero-outing", [-1.0, -1.1, -0.9]) == "confirmed"
    assert report.verdict("decoder 64", [1.0, 1.1, 0.9]) == "better"
    assert report.verdict("zero-outing", [-1.0]) == "open"


def test_a_part_of_the_runs_gives_a_part_of_the_tables(report, options, learning_plan, tmp_path):  # noqa: F811
    some = {}
    assert report.markdown(options, some) == f"0 of {learning_plan.expected(options)} runs are in.\n"
    finish(learning_plan, options, some, most=40)
    text = report.markdown(options, some)
    assert text.startswith(f"40 of {learning_plan.expected(options)} runs are in.")
    assert cells(text, "as published")[:3] == ["42.00 ± 1.00", "52.00 ± 1.00", "62.00 ± 1.00"]
    assert cells(text, "zero-outing")[0] == "38.00"
    assert cells(text, "zero-outing")[3:] == ["", "", "", "worse"], "one pair is no test"


def test_the_picture_is_drawn_of_what_there_is(report, options, rows, tmp_path):  # noqa: F811
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    report.draw(options, {}, tmp_path / "none.png")
    report.draw(options, rows, tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "all.png").stat().st_size > (tmp_path / "none.png").stat().st_size
