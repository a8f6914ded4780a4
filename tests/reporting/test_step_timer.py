"""Seconds of every phase, summed over steps and parts; on a GPU nothing waits but the reading."""

import itertools

import pytest
import torch
from torch import nn

from spark_fast.reporting.step_timer import StepClock
from spark_fast.training.optimizers.optim import build_optimizer
from spark_fast.training.schedule import Schedule
from spark_fast.training.step import TrainStep

CPU = torch.device("cpu")


def test_each_phase_lasts_from_its_mark_to_the_next(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 7.0, 100.0, 101.0, 103.0, 107.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = StepClock(CPU)
    for phase in ("forward", "backward", "optimizer", None) * 2:  # between the steps, 93 s are nobody's
        clock.mark(phase)
    assert clock.read() == {"forward": 2.0, "backward": 4.0, "optimizer": 8.0}
    assert clock.read() == dict.fromkeys(("forward", "backward", "optimizer"), 0.0), "counted anew after a reading"


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_marks_every_part_and_the_parts_are_summed(monkeypatch, accumulate):
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))

    class Mean(nn.Linear):
        def forward(self, images, visible):
            return super().forward(images).square().mean()

    model = Mean(3, 2)
    advance = TrainStep(model, build_optimizer("sgd", model, 0.9), Schedule(0.1, 1, 10, 0, 0), precision="fp32",
                        device=CPU, clip=0.0, accumulate=accumulate)  # fmt: skip
    for step in range(2):
        advance(step, torch.ones(4, 3), torch.ones(4, 1))
    assert advance.clock.read() == {"forward": 2.0 * accumulate, "backward": 2.0 * accumulate, "optimizer": 2.0}


def test_on_a_gpu_the_host_waits_at_the_reading_alone(monkeypatch):
    """Events stand in for a GPU's: what matters is which of their methods are called, and when."""
    called = []

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            called.append("record")
            self.at = 1000.0 * called.count("record")  # ms

        def synchronize(self):
            called.append("wait")

        def elapsed_time(self, other):
            assert "wait" in called, "read before the device came to it"
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = StepClock(torch.device("cuda"))
    for phase in ("forward", "backward", "optimizer", None) * 3:
        clock.mark(phase)
    assert called == ["record"] * 12
    assert clock.read() == {"forward": 3.0, "backward": 3.0, "optimizer": 3.0}
    assert called.count("wait") == 1
    clock.read()
    assert called.count("wait") == 1, "there is nothing to wait for"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_real_events_measure_what_the_device_did():
    clock, device = StepClock(torch.device("cuda")), torch.device("cuda")
    a = torch.randn(2048, 2048, device=device)
    clock.mark("forward")
    for _ in range(20):
        a @ a
    clock.mark("backward")
    clock.mark(None)
    seconds = clock.read()
    assert seconds["forward"] > 10 * seconds["backward"] >= 0
