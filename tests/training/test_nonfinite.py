"""A step that is not finite leaves no trace: weights, moments, statistics and schedule go on as if it had not been."""

import pytest
import torch
from torch import nn

from spark_fast.training.optimizers.optim import build_optimizer
from spark_fast.training.schedule import Schedule
from spark_fast.training.step import TrainStep

CPU = torch.device("cpu")
SCHEDULE = Schedule(peak_lr=0.1, warmup_steps=0, total_steps=10, weight_decay=0.04, weight_decay_end=0.2)
pytestmark = pytest.mark.usefixtures("one_thread")


class Normed(nn.Module):
    """(images, visible) -> loss, with batch statistics."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, images, visible):
        return (self.norm(self.layer(images)) - visible).square().mean()


def batch(step, spoil=None):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(4, 3, 8, 8, generator=generator)
    if spoil is not None:
        images[2, 1, 3, 3] = spoil
    return images, torch.ones(4, 1, 1, 1)


def stepper(optimizer, precision="fp32"):
    model = Normed()
    return TrainStep(
        model, build_optimizer(optimizer, model, 0.95), SCHEDULE, precision=precision, device=CPU, clip=5.0
    )


def state(advance):
    moments = [v for s in advance.optimizer.state.values() for v in s.values()]
    return [*advance.model.state_dict().values(), *[torch.as_tensor(m) for m in moments if m is not None]]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", ["lamb", "adamw", "sgd"])
def test_a_bad_step_leaves_no_trace(optimizer, spoil):
    advance, clean = stepper(optimizer), stepper(optimizer)
    advance(0, *batch(0)), clean(0, *batch(0))
    assert not advance(1, *batch(1, spoil))[0].isfinite()
    assert same(state(advance), state(clean))
    advance(2, *batch(2)), clean(2, *batch(2))
    assert same(state(advance), state(clean))
    assert advance.guard.bad_steps() == [False, True, False]
    assert advance.guard.bad_steps() == []


def test_what_another_rank_met_is_skipped_here():
    advance = stepper("lamb")
    advance.guard._agree = torch.ones_like
    before = [t.clone() for t in state(advance)]
    advance(0, *batch(0))
    assert same(state(advance)[: len(before)], before)
    assert advance.guard.bad_steps() == [True]


def test_an_overflow_of_fp16_is_skipped_but_not_bad():
    advance = stepper("sgd", "fp16")
    advance.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = [t.clone() for t in state(advance)]
    advance(0, *batch(0))
    assert same(state(advance)[: len(before)], before)
    assert advance.guard.bad_steps() == [False]
    advance(0, *batch(0, float("nan")))
    assert advance.guard.bad_steps() == [True]
