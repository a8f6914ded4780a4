"""No board can stop training: whatever fails is one warning, and the others go on. W&B only where it is asked for."""

import importlib.machinery
import json
import math
import sys
import time
import types
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spark_fast.errors import SettingsError
from spark_fast.reporting import loggers as boards
from spark_fast.reporting.loggers import SafeLogger, open_loggers, require_wandb
from spark_fast.reporting.run_logger import RunLogger
from spark_fast.training.settings import Run, Settings

ROW = {"step": 2, "epoch": 1, "loss": 0.75, "lr": 0.1}
GRID = torch.zeros(3, 8, 8, dtype=torch.uint8)


def settings(**run):
    return replace(Settings(), run=Run(exp_name="name", **run))


def opened(folder, step=0, **run):
    chosen = settings(**run)
    return open_loggers(folder, step, wandb=chosen.run.wandb, name="name", config=chosen.to_dict())


def use(found, steps=(2,)):
    for board in found:
        for step in steps:
            board.point({**ROW, "step": step}, step)
        board.picture(GRID, steps[-1])
        board.close()


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def wandb(monkeypatch):
    """A module that remembers what it was told, in the place of W&B's."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.told, module.closed, module.fail = [], 0, lambda: None

    class Handle:
        def log(self, row, step):
            module.fail()
            module.told.append((step, row))

        def finish(self):
            module.closed += 1

    def init(**kwargs):
        module.fail()
        module.asked = kwargs
        return Handle()

    module.init, module.Image, module.Settings = init, lambda array: array.shape, dict
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_tensorboard_has_every_figure_and_the_pictures(tmp_path):
    use(opened(tmp_path))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {"train/loss", "train/lr"}
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(2, 0.75)]
    assert board.Tags()["images"] == ["reconstruction"]
    assert rows(tmp_path) == [ROW]


def test_an_evaluation_is_shown_as_such_and_what_was_shown_stays_after_a_resume_at_its_step(tmp_path, wandb):
    for step in (0, 2):
        found = opened(tmp_path, step=step, wandb="project")
        for board in found:
            if step == 0:
                board.point(ROW, 2)
                board.point({"step": 2, "epoch": 1, "knn_top1": 12.5}, 2, "eval")
                board.point({**ROW, "step": 3}, 3)
            board.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("eval/knn_top1")] == [(2, 12.5)]
    assert [e.step for e in board.Scalars("train/loss")] == [2], "step 3 will be run again"
    assert rows(tmp_path) == [ROW, {"step": 2, "epoch": 1, "knn_top1": 12.5}]
    assert (2, {"eval/knn_top1": 12.5, "eval/epoch": 1}) in wandb.told


def test_a_rank_that_does_not_write_has_no_boards():
    assert open_loggers(None, 0, wandb="p") == []


def test_wandb_is_not_loaded_unless_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    use(opened(tmp_path))
    with pytest.raises(SettingsError, match=r"pip install 'spark-fast\[wandb\]'"):
        require_wandb()


def test_wandb_gets_every_figure_and_the_same_run_after_a_resume(tmp_path, wandb):
    use(opened(tmp_path, wandb="project"))
    first = wandb.asked
    assert (first["project"], first["name"], first["dir"]) == ("project", "name", str(tmp_path))
    assert first["config"] == settings(wandb="project").to_dict()
    assert wandb.told == [(2, {"train/loss": 0.75, "train/lr": 0.1, "train/epoch": 1}),
                          (2, {"reconstruction": (8, 8, 3)})]  # fmt: skip
    assert wandb.closed == 1
    use(opened(tmp_path, step=2, wandb="project"))
    assert (wandb.asked["id"], wandb.asked["resume"]) == (first["id"], "allow")


def broken_tensorboard(monkeypatch, tmp_path):
    def fail(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", fail)


def no_tensorboard(monkeypatch, tmp_path):
    (tmp_path / "tensorboard").write_text("a file in its place")


def broken_metrics(monkeypatch, tmp_path):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", fail)


def no_network(monkeypatch, tmp_path):
    def fail():
        raise ConnectionError("network is unreachable")

    sys.modules["wandb"].fail = fail


BROKEN = [(broken_tensorboard, "TensorBoard"), (no_tensorboard, "TensorBoard"), (broken_metrics, "metrics.jsonl"),
          (no_network, "Weights & Biases")]  # fmt: skip


@pytest.mark.parametrize(("breaks", "name"), BROKEN, ids=lambda v: getattr(v, "__name__", ""))
def test_what_fails_is_one_warning_and_the_others_go_on(tmp_path, monkeypatch, wandb, caplog, breaks, name):
    with monkeypatch.context() as patched:
        breaks(patched, tmp_path)
        use(opened(tmp_path, wandb="project"), steps=(2, 4, 6))
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{name} failed (")
    assert record.getMessage().endswith("training continues without it")
    expected = [] if name == "metrics.jsonl" else [2, 4, 6]
    assert [r["step"] for r in rows(tmp_path)] == expected
    assert [step for step, _ in wandb.told] == ([] if name == "Weights & Biases" else [2, 4, 6, 6])


def test_a_board_that_fails_for_a_while_is_used_again(tmp_path, wandb, caplog):
    (board,) = [b for b in opened(tmp_path, wandb="project") if b._harmless._name == "Weights & Biases"]
    for step, fails in ((1, False), (2, True), (3, True), (4, False)):
        wandb.fail = (lambda: 1 / 0) if fails else (lambda: None)
        board.point(ROW, step)
    assert [step for step, _ in wandb.told] == [1, 4]
    assert len(caplog.records) == 1


def test_leaving_is_no_failure():
    def leave():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SafeLogger("x", leave)


def test_what_is_no_number_reaches_tensorboard_and_leaves_the_json_valid(tmp_path, caplog):
    found = opened(tmp_path)
    for board in found:
        board.point({**ROW, "loss": math.inf, "lr": math.nan}, 2)
        board.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)["loss"] is None
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert scalars[0].value == math.inf
    assert not caplog.records


MEANS = {"loss": 1.0, "images_per_second": 8.0, "data_wait": 0.5, "mfu": 0.1, "seconds": 10.0, "steps": 5, "skipped": 0}


def test_a_clock_that_jumps_changes_no_figure(tmp_path, monkeypatch):
    now = iter([2e9, 1e9, 3e9, 0.0, 1.0] * 20)
    monkeypatch.setattr(time, "time", lambda: next(now))
    story = RunLogger(tmp_path, total_steps=20, steps_per_epoch=5, epochs=4, step=0, loggers=opened(tmp_path))
    story.point(5, MEANS, 0.1, 0.04)
    story.epoch(5)
    story.close()
    (row,) = rows(tmp_path)
    assert row["images_per_second"] == 8.0
    assert json.loads((tmp_path / "log.txt").read_text())["remaining"] == "0:00:30"


def test_log_txt_that_cannot_be_written_is_one_warning_too(tmp_path, caplog):
    (tmp_path / "log.txt").mkdir()
    story = RunLogger(tmp_path, total_steps=20, steps_per_epoch=5, epochs=4, step=0)
    for step in (5, 10):
        story.point(step, MEANS, 0.1, 0.04)
        story.epoch(step)
    story.close()
    (record,) = caplog.records
    assert record.getMessage().startswith("log.txt failed (IsADirectoryError")


def test_the_patience_with_wandb_is_passed_on(tmp_path, wandb):
    opened(tmp_path, wandb="project")
    assert set(wandb.asked["settings"].values()) == {boards.PATIENCE}
