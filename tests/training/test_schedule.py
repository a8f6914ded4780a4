"""Schedules by their published formulas."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_fast.training.schedule import learning_rate, weight_decay


def published(step, peak, warmup, total, decay, decay_end):
    """pretrain/utils/lr_control.py: lr_wd_annealing, written out again."""
    warmup = round(warmup)
    if step < warmup:
        lr = 0.005 * peak + 0.995 * peak * step / warmup
    else:
        ratio = (step - warmup) / (total - 1 - warmup)
        lr = 0.001 * peak + 0.999 * peak * (0.5 + 0.5 * math.cos(math.pi * ratio))
    wd = decay_end + (decay - decay_end) * (0.5 + 0.5 * math.cos(math.pi * step / (total - 1)))
    return lr, wd


@given(
    total=st.integers(3, 10**6), warm=st.floats(0, 0.9), at=st.floats(0, 1), peak=st.floats(1e-6, 1),
    decays=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)  # fmt: skip
@settings(max_examples=200)
def test_schedules_are_the_published_formulas(total, warm, at, peak, decays):
    step, warmup = round(at * (total - 1)), min(warm * total, total - 2)
    lr, wd = published(step, peak, warmup, total, *decays)
    assert learning_rate(step, peak, warmup, total) == pytest.approx(lr, rel=1e-9)
    assert weight_decay(step, *decays, total) == pytest.approx(wd, rel=1e-9, abs=1e-12)


@given(total=st.integers(5, 1000), warmup=st.integers(1, 400))
def test_the_rate_rises_to_its_peak_and_falls_to_a_thousandth(total, warmup):
    warmup = min(warmup, total - 3)
    rates = [learning_rate(s, 2.0, warmup, total) for s in range(total)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[warmup] == max(rates) == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.002)
    assert all(a < b for a, b in pairwise(rates[: warmup + 1]))
    assert all(a > b for a, b in pairwise(rates[warmup:]))


def test_without_warm_up_the_first_step_is_the_peak():
    assert learning_rate(0, 3.0, 0, 10) == pytest.approx(3.0)
    assert learning_rate(9, 3.0, 0, 10) == pytest.approx(0.003)


def test_a_run_of_one_step_has_finite_rates():
    assert learning_rate(0, 3.0, 0, 1) == pytest.approx(3.0)
    assert learning_rate(0, 3.0, 5, 1) == pytest.approx(0.015)
    assert weight_decay(0, 0.04, 0.2, 1) == pytest.approx(0.04)


@pytest.mark.parametrize("warmup", [9, 10, 50])
def test_warm_up_as_long_as_the_run_or_longer_keeps_rising(warmup):
    rates = [learning_rate(s, 1.0, warmup, 10) for s in range(10)]
    assert rates == sorted(rates)
    assert rates[-1] <= 1.0
