"""The tables and the picture of docs/explanation/learning.md are those of the recorded results."""

import pytest

from docs.generate import draw_gains
from docs.generate.draw_gains import (
    FORMS_SHOWN,
    MARKS,
    MARKS_OF_FINDINGS,
    PAGE,
    RESULTS,
    Found,
    Study,
    findings,
    read_study,
    table,
)


@pytest.fixture
def recorded():
    return [read_study(RESULTS, form) for form in FORMS_SHOWN]


def found(*percent):
    return Found(None, {way: dict(enumerate(v + i for v in percent)) for i, way in enumerate(("k-NN", "1%"))})


def study(**others):
    arms = {"as published": found(50.0, 51.0, 52.0)}
    return Study("pictures", ["k-NN", "1%"], arms | {name: found(*v) for name, v in others.items()})


def test_the_page_has_the_tables_of_the_recorded_results(recorded):
    page = PAGE.read_text(encoding="utf-8")
    assert table(recorded) in page
    assert findings(recorded) in page


def test_every_arm_is_compared_with_spark_seed_by_seed():
    shown = study(scratch=(40.0, 41.1, 42.2), FCMAE=(50.0, 51.0, 52.0))
    assert "| pictures | from scratch | -9.90 ± 0.10 | -9.90 ± 0.10 | 0.000 | confirmed |" in findings([shown])
    assert "| pictures | FCMAE | 0.00 ± 0.00 | 0.00 ± 0.00 | 1.000 | open |" in findings([shown])


def test_an_arm_that_one_of_the_studies_lacks_leaves_its_cells_empty():
    shown = table([study(scratch=(40.0, 41.0, 42.0)), study()])
    assert "| from scratch | 42.00 ± 1.00 % |  |" in shown


def test_picture_and_tables_are_written(recorded, tmp_path):
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    page = tmp_path / "page.md"
    page.write_text("before\n{}\nold\n{}\nbetween\n{}\nold\n{}\nafter\n".format(*MARKS, *MARKS_OF_FINDINGS))
    assert draw_gains.main(["--out", str(tmp_path / "a.png"), "--page", str(page)]) == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    text = page.read_text()
    assert text.startswith("before\n")
    assert "\nbetween\n" in text
    assert text.endswith("after\n")
    assert table(recorded) in text
    assert findings(recorded) in text
    assert "old" not in text


def test_a_page_without_marks_and_another_ending_are_refused_and_nothing_is_written(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("no marks")
    assert draw_gains.main(["--out", str(tmp_path / "a.png"), "--page", str(page)]) == 2
    assert "needs the two marks" in capsys.readouterr().err
    assert draw_gains.main(["--out", str(tmp_path / "a.jpg")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
