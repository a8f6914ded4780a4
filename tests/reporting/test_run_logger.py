"""What a run tells: one line of JSON per log point, means since the last one, and nothing twice after a resume."""

import io
import json
import sys

import pytest
import torch

from spark_fast.reporting.loggers import SafeLogger
from spark_fast.reporting.metrics_file import MetricsFile
from spark_fast.reporting.run_logger import RunLogger


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
