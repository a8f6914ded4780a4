"""The picture of docs/how_to/is_it_learning.md is drawn from recorded losses."""

import json

import pytest

from docs.generate import draw_learning_curves
from docs.generate.draw_learning_curves import points_of, read_curves
from spark_fast.reporting.run_summary import nothing_learned


def test_the_recorded_runs_are_told_apart_by_what_is_said_at_their_end():
    ends = {name: curve["points"][-1][1] for name, curve in read_curves().items()}
    learned = {name for name, loss in ends.items() if not nothing_learned(loss)}
    assert learned
    assert {name for name in ends if "as published" in name} == set(ends) - learned != set()


def test_a_loss_is_recorded_every_tenth_step_as_the_mean_since_the_last(tmp_path):
    rows = [{"step": step, "loss": loss} for step, loss in ((2, 1.0), (10, 0.5), (15, 0.4), (20, 0.2), (23, 9.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert points_of(tmp_path) == [[10, 0.6], [20, 0.3]]


def test_the_picture_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    assert draw_learning_curves.main(["--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert len(capsys.readouterr().out.splitlines()) == len(read_curves())


def test_another_ending_is_refused(tmp_path, capsys):
    assert draw_learning_curves.main(["--out", str(tmp_path / "a.jpg")]) == 2
    assert "must end with .png" in capsys.readouterr().err
