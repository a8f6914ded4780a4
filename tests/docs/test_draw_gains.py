"""The table and the picture of docs/explanation/learning.md are those of the recorded result."""

import json

import pytest

from docs.generate import draw_gains
from docs.generate.draw_gains import MARKS, PAGE, RESULT, Case, read_cases, table


def rows(arm, share, top1):
    run = {"network": "small_resnet", "share": share}
    return [{"arm": arm, "run": {**run, "seed": seed}, "top1": value} for seed, value in enumerate(top1)]


def result_of(path, *groups):
    path.write_text(json.dumps({"rows": [row for group in groups for row in reversed(group)]}))
    return path


def test_the_page_has_the_table_of_the_recorded_result():
    assert table(read_cases(RESULT)) in PAGE.read_text(encoding="utf-8")


def test_arms_are_paired_by_seed_and_a_case_without_both_is_left_out(tmp_path):
    path = result_of(
        tmp_path / "a.json",
        rows("scratch", 0.1, [40.0, 42.0]),
        rows("pre-trained", 0.1, [41.0, 46.0]),
        rows("scratch", 1.0, [50.0, 51.0]),
        rows("scratch swept", 0.01, [30.0]),
    )
    (case,) = read_cases(path)
    assert case == Case("small_resnet", 0.1, [40.0, 42.0], [41.0, 46.0])
    assert case.gains == [1.0, 4.0]
    assert "| small ResNet | 10% | 41.0 % | 43.5 % | +2.5 ± 2.1 points |" in table([case])


def test_picture_and_table_are_written(tmp_path):
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    assert draw_gains.main(["--out", str(tmp_path / "a.png"), "--page", str(page)]) == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert table(read_cases(RESULT)) in text
    assert "old" not in text


def test_a_page_without_marks_and_another_ending_are_refused_and_nothing_is_written(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("no marks")
    assert draw_gains.main(["--out", str(tmp_path / "a.png"), "--page", str(page)]) == 2
    assert "needs the two marks" in capsys.readouterr().err
    assert draw_gains.main(["--out", str(tmp_path / "a.jpg")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
