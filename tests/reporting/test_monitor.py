"""The figures between log points: means, times, and what is handed to whom."""

import math

import pytest
import torch

from spark_fast.reporting.loss_spikes import Spikes
from spark_fast.reporting.monitor import Meter, Monitor
from spark_fast.reporting.step_timer import StepClock

CPU = torch.device("cpu")


class Shown:
    """A logger that remembers."""

    def __init__(self):
        self.steps, self.points, self.closed = [], [], False

    def advance(self, step):
        self.steps.append(step)

    def point(self, step, means, lr, weight_decay):
        self.points.append((step, means, lr, weight_decay))

    def close(self):
        self.closed = True


def monitor(**parts):
    shown = Shown()
    made = Monitor(
        shown,
        images_per_step=4,
        clock=StepClock(CPU),
        rates=lambda step: (step / 10, 0.5),
        mean_over_ranks=lambda x: x,
        **parts,
    )
    return made, shown


def steps(made, losses, first=1):
    for step, loss in enumerate(losses, first):
        made.add(step, torch.tensor(loss), torch.tensor(2.0), torch.tensor([step]))


def test_a_log_point_gets_the_means_since_the_last_one_and_the_rates_of_its_last_step():
    made, shown = monitor()
    steps(made, [1.0, 3.0])
    assert made.point(2, math.nan) == 2.0
    steps(made, [5.0], first=3)
    assert made.point(3, 2.0) == 5.0
    (first, means, lr, decay), (second, *_) = shown.points
    assert (first, second, shown.steps) == (2, 3, [1, 2, 3])
    assert (means["loss"], means["steps"], lr, decay) == (2.0, 2, 0.1, 0.5)
    assert {"data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds", "step_seconds"} <= set(means)
    assert made.last["loss"] == 5.0
    assert made.last["step"] == 3


def test_where_all_steps_were_skipped_the_loss_is_the_one_before():
    made, _ = monitor()
    steps(made, [math.nan, math.nan])
    assert made.point(2, 7.0) == 7.0
    assert made.last["skipped"] == 2


def test_spikes_are_looked_for_with_the_samples_of_the_step(caplog):
    made, _ = monitor(spikes=Spikes())
    steps(made, [1.0] * 24 + [9.0])
    made.point(25, math.nan)
    assert "jumped to 9.0000 at step 25" in caplog.text
    assert caplog.messages[-1].endswith(": 25")


def test_what_passes_between_two_epochs_counts_for_neither():
    made, _ = monitor()
    list(made.timed([1]))
    made.meter.since -= 1000.0  # a long save
    for _ in made.timed([1]):
        steps(made, [1.0])
    assert made.read()["seconds"] < 500


def test_closing_closes_the_logger():
    made, shown = monitor()
    made.close()
    assert shown.closed


def test_a_meter_gives_means_since_its_last_reading():
    meter = Meter()
    for loss, norm in ((1.0, 10.0), (2.0, 20.0), (6.0, 30.0)):
        meter.add(torch.tensor(loss), torch.tensor(norm))
    found = meter.read(4, lambda x: x)
    assert (found["loss"], found["grad_norm"], found["steps"]) == (3.0, 30.0, 3)
    assert found["images_per_second"] == pytest.approx(12 / found["seconds"])
    meter.add(torch.tensor(5.0), torch.tensor(1.0))
    found = meter.read(4, lambda x: x * 2)
    assert (found["loss"], found["grad_norm"], found["steps"]) == (10.0, 1.0, 1)
    for loss, norm in ((1.0, 10.0), (math.nan, 20.0), (3.0, math.inf), (5.0, 40.0)):
        meter.add(torch.tensor(loss), torch.tensor(norm))
    found = meter.read(4, lambda x: x)
    assert (found["loss"], found["grad_norm"], found["steps"], found["skipped"]) == (3.0, 40.0, 4, 2)


def test_the_share_of_time_spent_waiting_for_data_is_measured(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def slow():
        for i in range(4):
            now[0] += 6
            yield i

    meter, received = Meter(), []
    for item in meter.timed(slow()):
        received.append(item)
        now[0] += 2  # the step itself
        meter.add(torch.tensor(1.0), torch.tensor(1.0))
    assert received == [0, 1, 2, 3]
    assert meter.wait == 4 * 6
    assert meter.read(1, lambda x: x)["data_wait"] == 0.75
    for _ in meter.timed(range(3)):
        now[0] += 2
        meter.add(torch.tensor(1.0), torch.tensor(1.0))
    assert meter.read(1, lambda x: x)["data_wait"] == 0, "counted anew after a reading"
