"""When a run is evaluated, that each evaluation is done once, and how one is given up."""

import json
import re

import pytest
from torch import nn

from spark_fast.errors import DataError
from spark_fast.reporting.loggers import open_loggers
from spark_fast.reporting.run_logger import RunLogger
from spark_fast.run.watchdog import Watchdog
from spark_fast.training.online_evaluation import OnlineEvaluation, StoppedError, stoppable
from spark_fast.training.run_state import Position


class Measured:
    """An evaluator that gives one figure more each time, and fails as it is told."""

    about = "a count"

    def __init__(self, bad=(), stop=False):
        self.bad, self.stop, self.count = list(bad), stop, 0

    def measure(self, network):
        if self.stop:
            raise StoppedError
        self.count += 1
        return {"knn_top1": float(self.count)}

    def unreadable(self):
        return self.bad

    def close(self):
        pass


def evaluation(evaluator, alone, folder, *, step=0, every=2, epochs=5):
    """Of a run with 3 steps an epoch, in a process that begins at `step`."""
    at = Position(3, epochs, step=step, begun=step)
    logger = RunLogger(
        folder,
        total_steps=at.total_steps,
        steps_per_epoch=3,
        epochs=epochs,
        step=step,
        loggers=open_loggers(folder, step),
    )
    more = {"logger": logger, "ranks": alone, "watchdog": Watchdog(600), "folder": folder}
    return OnlineEvaluation(evaluator, nn.Identity(), at, every, **more)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_comes_before_the_first_step_every_so_many_epochs_and_after_the_last(alone, tmp_path, capsys):
    online = evaluation(Measured(), alone, tmp_path)
    for epoch in range(6):
        online.position.step = 3 * epoch
        assert online() is False
    found = rows(tmp_path)
    assert all(row.pop("eval_seconds") >= 0 for row in found)
    assert found == [
        {"step": 0, "epoch": 0, "knn_top1": 1.0},
        {"step": 6, "epoch": 2, "knn_top1": 2.0},
        {"step": 12, "epoch": 4, "knn_top1": 3.0},
        {"step": 15, "epoch": 5, "knn_top1": 4.0},
    ]
    assert online.last == {"knn_top1": 4.0}
    assert re.search(r"epoch 4/5 evaluated in \d+\.\d s: knn_top1 3\.00 %\n", capsys.readouterr().out)
    logged = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [(row["epoch"], row["knn_top1"]) for row in logged] == [("0/5", 1), ("2/5", 2), ("4/5", 3), ("5/5", 4)]


@pytest.mark.parametrize(("step", "done"), [(6, True), (12, False)])
def test_what_an_earlier_process_has_done_is_not_done_again(alone, tmp_path, step, done):
    before = evaluation(Measured(), alone, tmp_path)
    before.position.step = 6
    before()
    before.logger.close()
    online = evaluation(Measured(), alone, tmp_path, step=step)
    online()
    assert online.evaluator.count == (not done)
    assert [row["step"] for row in rows(tmp_path)] == ([6] if done else [6, 12])


def test_a_log_point_at_that_step_is_no_evaluation(alone, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 6, "epoch": 2, "loss": 0.5}\n')
    online = evaluation(Measured(), alone, tmp_path, step=6)
    online()
    assert online.evaluator.count == 1


def test_one_that_is_given_up_leaves_no_row_and_is_told(alone, tmp_path):
    online = evaluation(Measured(stop=True), alone, tmp_path)
    assert online() is True
    assert rows(tmp_path) == []
    assert online.last == {}


def test_unreadable_images_end_a_run_before_its_first_step_and_not_amid_it(alone, tmp_path):
    online = evaluation(Measured(bad=["3 red/3.jpg: truncated"]), alone, tmp_path)
    with pytest.raises(DataError, match=r"--val_path cannot be read, .*: 3 red/3\.jpg: truncated\. Repair or remove"):
        online()
    assert rows(tmp_path) == []
    online.position.step = 6
    assert online() is False
    assert [row["step"] for row in rows(tmp_path)] == [6]


def test_a_rank_that_does_not_write_evaluates_with_the_others(alone):
    online = evaluation(Measured(), alone, None)
    assert online() is False
    assert online.last == {"knn_top1": 1.0}


def test_before_each_batch_the_watchdog_hears_of_it_and_a_signal_ends_it(alone):
    class Asked:
        asked = False

    watchdog, interrupt = Watchdog(600), Asked()
    alive = stoppable(Position(3, 2, step=3), alone, watchdog, interrupt)
    alive(0)
    assert (watchdog._step, watchdog._doing) == (3, "evaluating")
    interrupt.asked = True
    with pytest.raises(StoppedError):
        alive(1)
