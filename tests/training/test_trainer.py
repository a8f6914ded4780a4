"""The loop: what happens after which step, how a run is left, and how it goes on."""

import math

import pytest
import torch

from spark_fast.checkpoint.file import read_run
from spark_fast.checkpoint.manager import CHECKPOINT, CheckpointManager, published
from spark_fast.errors import NotFiniteError
from spark_fast.reporting.monitor import Monitor
from spark_fast.reporting.step_timer import StepClock
from spark_fast.run.watchdog import Watchdog
from spark_fast.training.checkpointer import Checkpointer
from spark_fast.training.nonfinite import NonfiniteGuard, NonfiniteReport
from spark_fast.training.trainer import Trainer


class Events:
    """The logger, the end of an epoch and the step of a run, which write down what happens."""

    def __init__(self, state, guard, spoiled=()):
        self.state, self.guard, self.spoiled, self.seen = state, guard, spoiled, []

    def advance(self, step):
        pass

    def point(self, step, means, lr, weight_decay):
        self.seen.append(f"log {step}")

    def close(self):
        self.seen.append("close")

    def end_of_epoch(self, save):
        self.seen.append(f"epoch {self.state.position.epoch}")
        save()

    def between_epochs(self, give_up_at):
        self.seen.append(f"between {self.state.position.step}")
        return self.state.position.step == give_up_at

    def step(self, step, batch):
        bad = step in self.spoiled
        self.state.optimizer.zero_grad()
        loss = self.state.model(batch.images).square().mean()
        loss.backward()
        if not bad:
            self.state.optimizer.step()
        self.guard.note(torch.tensor(float(bad)))
        self.seen.append(f"step {step} of samples {batch.ids.tolist()}")
        return torch.tensor(math.nan) if bad else loss.detach(), torch.tensor(1.0)


class Patient(Checkpointer):
    """Waits for every write: a save that falls due while another is in flight would be put off."""

    def save(self):
        super().save()
        self.wait()


class Asked:
    """An interruption that comes while step `at` is taken."""

    def __init__(self, state, at):
        self.state, self.at = state, at

    @property
    def asked(self):
        return self.at is not None and self.state.position.step >= self.at


def build(
    state, alone, folder, *, log_every=100, every=0, stop_at=None, max_steps=0, spoiled=(), limit=3, give_up_at=None
):
    guard = NonfiniteGuard(state.model, torch.clone, overflow_is_normal=False)
    events = Events(state, guard, spoiled)
    folder.mkdir(exist_ok=True)
    trainer = Trainer(
        events.step,
        state.data,
        Patient(state, CheckpointManager(folder, keep_last=9, keep_steps=0), steps=every),
        monitor=Monitor(
            events,
            images_per_step=2,
            clock=StepClock(alone.device),
            rates=lambda step: (0.1, 0.0),
            mean_over_ranks=alone.mean,
        ),
        nonfinite=NonfiniteReport(guard, alone, limit),
        end_of_epoch=events.end_of_epoch,
        between_epochs=lambda: events.between_epochs(give_up_at),
        ranks=alone,
        watchdog=Watchdog(600),
        interrupt=Asked(state, stop_at),
        log_every=log_every,
        max_steps=max_steps,
        folder=folder,
    )
    return trainer, events


def test_a_whole_run_logs_and_saves_at_the_end_of_every_epoch(make_state, alone, tmp_path):
    state = make_state(epochs=2)
    trainer, events = build(state, alone, tmp_path)
    assert trainer.train() is True
    assert events.seen == [
        "between 0",
        "step 0 of samples [0, 0]", "step 1 of samples [0, 1]", "step 2 of samples [0, 2]", "log 3", "epoch 1",
        "between 3",
        "step 3 of samples [1, 0]", "step 4 of samples [1, 1]", "step 5 of samples [1, 2]", "log 6", "epoch 2",
        "between 6", "close",
    ]  # fmt: skip
    assert list(published(tmp_path)) == [6, 3]


def test_log_points_and_saves_come_between_as_asked(make_state, alone, tmp_path):
    trainer, events = build(make_state(epochs=2), alone, tmp_path, log_every=2, every=4)
    assert trainer.train()
    assert [e for e in events.seen if e.startswith("log")] == ["log 2", "log 3", "log 4", "log 6"]
    assert list(published(tmp_path)) == [6, 4, 3]


@pytest.mark.parametrize("how", ["stop_at", "max_steps"])
def test_interrupted_it_saves_says_how_to_go_on_and_goes_on_to_the_same_weights(
    make_state, alone, tmp_path, capsys, how
):
    unbroken, first, second = make_state(), make_state(), make_state()
    assert build(unbroken, alone, tmp_path / "a")[0].train()
    assert build(first, alone, tmp_path / "b", **{how: 4})[0].train() is False
    last = tmp_path / "b" / CHECKPOINT
    assert f"stopped at step 4 of 6; saved {last}. Continue with the same command and --resume auto" in (
        capsys.readouterr().out
    )
    second.restore(last, read_run(last), alone)
    trainer, _ = build(second, alone, tmp_path / "b")
    assert trainer.train()
    assert second.data.opened == [(1, 1)], "at the very next batch"
    assert torch.equal(second.model.weight, unbroken.model.weight)


def test_interrupted_at_the_last_step_of_all_it_is_done(make_state, alone, tmp_path):
    trainer, events = build(make_state(), alone, tmp_path, stop_at=6)
    assert trainer.train() is True
    assert events.seen[-3:] == ["epoch 2", "between 6", "close"]


def test_a_run_that_is_complete_takes_no_step(make_state, alone, tmp_path):
    state = make_state()
    state.position.step = 6
    trainer, events = build(state, alone, tmp_path)
    assert trainer.train() is True
    assert events.seen == ["between 6", "close"]


@pytest.mark.parametrize("step", [0, 3, 6])
def test_told_to_stop_between_epochs_it_is_saved_and_a_resume_begins_there_again(
    make_state, alone, tmp_path, capsys, step
):
    trainer, events = build(make_state(), alone, tmp_path, give_up_at=step)
    assert trainer.train() is False
    assert events.seen[-2:] == [f"between {step}", "close"]
    last = tmp_path / CHECKPOINT
    assert f"stopped at step {step} of 6; saved {last}. Continue" in capsys.readouterr().out
    state = make_state()
    state.restore(last, read_run(last), alone)
    trainer, events = build(state, alone, tmp_path)
    assert trainer.train() is True
    assert events.seen[0] == f"between {step}"
    assert sum(event.startswith("step") for event in events.seen) == 6 - step


def test_in_the_middle_of_an_epoch_nothing_comes_between(make_state, alone, tmp_path):
    state = make_state()
    state.position.step = state.position.begun = 2
    trainer, events = build(state, alone, tmp_path)
    assert trainer.train()
    assert events.seen[0] == "step 2 of samples [0, 2]"


def test_nothing_is_saved_amid_steps_that_are_not_finite_and_too_many_end_the_run(make_state, alone, tmp_path):
    trainer, events = build(make_state(), alone, tmp_path, every=1, spoiled=(3, 4), limit=2)
    with pytest.raises(NotFiniteError, match="not finite in 2 steps in a row, the last one step 5"):
        trainer.train()
    assert list(published(tmp_path)) == [3, 2, 1]
    assert events.seen[-1] == "close"
