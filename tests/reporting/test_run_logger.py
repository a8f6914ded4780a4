"""What a run tells: one line of JSON per log point, means since the last one, and nothing twice after a resume."""

import io
import json
import sys

import pytest
import torch

from spark_fast.reporting.loggers import SafeLogger
from spark_fast.reporting.metrics_file import MetricsFile
from spark_fast.reporting.run_logger import RunLogger
from spark_fast.streams import KeptStream


def means(loss=1.0, steps=2, seconds=4.0, wait=0.25, speed=8.0):
    return {
        "loss": loss, "grad_norm": 3.0, "images_per_second": speed, "data_wait": wait,
        "seconds": seconds, "steps": steps, "skipped": 0, "mfu": 0.25, "forward_seconds": 0.5,
    }  # fmt: skip


def journal(folder, step=0):
    boards = [SafeLogger("metrics.jsonl", lambda: MetricsFile(folder / "metrics.jsonl", step))] if folder else []
    return RunLogger(folder, total_steps=20, steps_per_epoch=5, epochs=4, step=step, loggers=boards)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def written(folder, steps):
    story = journal(folder)
    for step in steps:
        story.point(step, means(loss=step / 10), 0.1, 0.04)
    story.close()


def test_every_log_point_is_a_line_of_json(tmp_path, capsys):
    story = journal(tmp_path)
    story.point(2, means(loss=0.75), lr=0.1, weight_decay=0.04)
    expected = {"step": 2, "epoch": 1, "lr": 0.1, "weight_decay": 0.04, "loss": 0.75, "grad_norm": 3.0, "skipped": 0,
                "images_per_second": 8.0, "data_wait": 0.25, "mfu": 0.25, "forward_seconds": 0.5}  # fmt: skip
    assert rows(tmp_path) == [expected], "readable while the run goes on"
    story.close()
    said = capsys.readouterr()
    assert "epoch 1/4  step 2/20  loss 0.7500  8.0 images/s  MFU 25.0%  data wait 25.0%" in said.out
    assert said.err == ""


def test_the_last_step_of_an_epoch_belongs_to_it(tmp_path):
    written(tmp_path, [1, 5, 6, 10, 20])
    assert [r["epoch"] for r in rows(tmp_path)] == [1, 1, 2, 2, 4]


def test_an_epochs_line_has_means_over_its_steps_and_time(tmp_path):
    story = journal(tmp_path)
    story.point(2, means(loss=1.0, steps=2, seconds=4.0, wait=0.5, speed=8.0), 0.1, 0.04)
    story.point(5, means(loss=0.5, steps=3, seconds=2.0, wait=0.0, speed=24.0), 0.1, 0.04)
    story.epoch(5, {"replaced": 7})
    story.point(10, means(loss=0.25, steps=5), 0.1, 0.04)
    story.epoch(10)
    story.close()
    first, second = (json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines())
    assert (first["epoch"], first["step"], first["replaced"]) == ("1/4", 5, 7)
    assert first["loss"] == pytest.approx((2 * 1.0 + 3 * 0.5) / 5)
    assert first["images_per_second"] == pytest.approx((4 * 8 + 2 * 24) / 6)
    assert first["data_wait"] == pytest.approx(2.0 / 6)
    assert first["remaining"] == "0:00:24", "15 steps at 0.7 * 2 + 0.3 * 2/3 seconds"
    assert {"finish"} <= set(first)
    assert (second["epoch"], second["loss"]) == ("2/4", 0.25), "sums start over"


def resumed(folder):
    """log.txt's line of an epoch of 5 steps whose last 2 are taken after a resume."""
    story = journal(folder, step=3)
    story.point(5, means(loss=0.5, steps=2, seconds=2.0, wait=0.0, speed=24.0), 0.1, 0.04)
    story.epoch(5)
    story.close()
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])


def test_an_epochs_line_covers_the_steps_before_a_resume_too(tmp_path, capsys):
    story = journal(tmp_path)
    for step, steps, loss in ((2, 2, 1.0), (3, 1, 0.8), (4, 1, 9.0)):  # the last one is taken again
        figures = {**means(loss=loss, steps=steps, seconds=2.0 * steps), "step_seconds": 2.0}
        story.point(step, figures, 0.1, 0.04)
    story.close()
    row = resumed(tmp_path)
    assert row["loss"] == pytest.approx((2 * 1.0 + 0.8 + 2 * 0.5) / 5)
    assert row["images_per_second"] == pytest.approx((6 * 8 + 2 * 24) / 8)
    assert "of_its_last_steps" not in row
    assert "epoch 1/4 done: loss 0.7600" in capsys.readouterr().out


def test_where_its_beginning_is_lost_an_epochs_line_says_so(tmp_path, capsys):
    row = resumed(tmp_path)
    assert (row["loss"], row["of_its_last_steps"]) == (0.5, 2)
    assert "epoch 1/4 done (over its last 2 of 5 steps): loss 0.5000" in capsys.readouterr().out


def test_on_a_terminal_lines_are_shown_above_the_bar_and_the_copy_has_the_progress(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "__stderr__", terminal)
    monkeypatch.setattr(sys, "stdout", KeptStream(terminal))
    monkeypatch.setenv("TERM", "xterm")
    sys.stdout.copy_to(tmp_path / "stdout_backup.txt")
    story = journal(tmp_path)
    story.point(5, means(loss=0.75, steps=5), 0.1, 0.04)
    story.epoch(5)
    print("stopped at step 5 of 20; " + "x" * 200)  # longer than any terminal
    story.close()
    print("done")
    copy = (tmp_path / "stdout_backup.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in copy] == [
        "epoch 1/4  step 5/20  loss 0.7500  8.0 images/s  MFU 25.0%  data wait 25.0%", "epoch 1/4 done",
        "stopped at step 5 of 20; " + "x" * 200, "done",
    ]  # fmt: skip
    assert copy[2] in terminal.getvalue(), "not wrapped"
    assert terminal.getvalue().endswith("done\n")


def test_elsewhere_nothing_is_written_beside_the_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "__stderr__", io.StringIO())
    written(tmp_path, [1, 5])
    assert sys.__stderr__.getvalue() == ""


def test_an_epoch_without_a_log_point_writes_no_line(tmp_path):
    story = journal(tmp_path)
    story.epoch(5)
    story.close()
    assert not (tmp_path / "log.txt").exists()


def test_the_bar_shows_no_figure_before_there_is_one(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "__stderr__", terminal := Terminal())
    for name, value in {"TERM": "xterm", "COLUMNS": "90", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    story = journal(tmp_path, step=7)
    shown = terminal.getvalue()
    assert "epoch 2/4 ━" in shown
    assert " 7/20" in shown
    assert "images/s" not in shown
    assert "loss" not in shown
    story.point(10, means(loss=0.75), 0.1, 0.04)
    story.close()
    assert "loss 0.7500 8.0 images/s wait 25.0%" in terminal.getvalue()


def test_a_rank_that_does_not_write_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    story = journal(None)
    story.advance(1)
    story.point(5, means(), 0.1, 0.04)
    story.epoch(5)
    story.picture(torch.zeros(3, 8, 8, dtype=torch.uint8), 5)
    story.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
