"""A loss that jumps is told at the next log point, with the samples of its batch; noise and trends are not."""

import logging
import math

import numpy as np
import pytest
import torch

from spark_fast.pipelines.backends.synthetic import SyntheticPipeline
from spark_fast.pipelines.sampler import Sampler, order
from spark_fast.reporting.loss_spikes import ENOUGH, WINDOW, Spikes, limit
from spark_fast.run.distributed import Ranks
from spark_fast.run.signals import Interrupt
from spark_fast.run.watchdog import Watchdog
from spark_fast.training.pretrain import open_model
from spark_fast.training.pretrain_run import PretrainRun
from spark_fast.training.settings import parse


def noise(n, seed=0):
    return (1 + 0.02 * np.random.default_rng(seed).standard_normal(n)).tolist()


def fed(losses, every=10, mean=lambda x: x):
    """Batch k has the samples 10 k and 10 k + 1."""
    spikes = Spikes()
    for step, loss in enumerate(losses):
        spikes.add(torch.tensor(loss), torch.tensor([10 * step, 10 * step + 1]))
        if (step + 1) % every == 0:
            spikes.report(step + 1, mean)
    return spikes


def test_the_limit_is_six_deviations_above_the_median_whatever_a_few_outliers_are():
    losses = noise(WINDOW)
    found = limit(losses)
    assert found == pytest.approx(1 + 6 * 0.02, abs=0.06)
    assert limit([*losses[:-5], *[50.0] * 5]) == pytest.approx(found, abs=0.03)


def test_losses_that_hardly_move_are_given_half_a_percent():
    assert limit([2.0] * ENOUGH) == pytest.approx(2.0 * 1.03)


def test_too_few_losses_judge_nothing():
    assert limit([1.0] * (ENOUGH - 1)) == math.inf


def test_a_spike_is_told_within_the_log_interval_with_its_samples(caplog):
    losses = noise(60)
    losses[43] = 1.5
    fed(losses)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "jumped to 1.5000 at step 44;" in record.getMessage()
    assert record.getMessage().endswith("in that step: 430, 431")


def test_of_several_spikes_since_a_log_point_the_worst_is_told(caplog):
    losses = noise(60)
    losses[41], losses[43], losses[47] = 1.6, 3.0, 1.9
    fed(losses)
    (record,) = caplog.records
    assert "3.0000 at step 44 and 2 more steps since" in record.getMessage()
    assert record.getMessage().endswith("430, 431")


def test_neither_noise_nor_a_falling_loss_is_a_spike(caplog):
    fed(noise(2000, seed=1))
    fed([2 * math.exp(-i / 300) * x for i, x in enumerate(noise(2000, seed=2))])
    assert not caplog.records


def test_a_loss_that_stays_high_becomes_the_rule(caplog):
    fed(noise(200) + [2 * x for x in noise(200, seed=3)], every=1)
    steps = [r.getMessage().split("at step ")[1].split(";")[0] for r in caplog.records]
    assert steps[0] == "201"
    assert int(steps[-1]) < 255


def test_losses_that_are_no_numbers_are_left_to_others(caplog):
    losses = noise(60)
    losses[30], losses[31] = math.nan, math.inf
    fed(losses)
    assert not caplog.records


def test_it_is_the_mean_over_the_ranks_that_is_judged(caplog):
    losses = noise(60)
    losses[43] = 1.5
    fed(losses, mean=lambda x: x.clamp(max=1.0))
    assert not caplog.records


def test_a_report_of_nothing_is_nothing(caplog):
    Spikes().report(0, lambda x: x)
    assert not caplog.records


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_in_a_run_the_samples_are_those_of_the_pipelines_batch(caplog):
    """The steps are real, the losses they report are not."""
    settings = parse(["name", "--pipeline=synthetic", "--model=resnet10t", "--input_size=64", "--mask=0.5", "--bs=2",
                      "--decoder_width=32", "--ep=1", "--wp_ep=0", "--log_every=10"])  # fmt: skip
    ranks, schedule = Ranks(0, 1, torch.device("cpu"), None), Sampler(num_samples=60, batch_size=2, seed=0)
    run = PretrainRun(settings, ranks, SyntheticPipeline(schedule, (64, 64)), open_model(settings, ranks))
    losses, one_step = iter([*noise(24), 7.0, *noise(5, seed=1)]), run.step
    run.step = lambda step, batch: (torch.tensor(next(losses)), one_step(step, batch)[1])
    interrupt = Interrupt()
    assert run.trainer(None, None, Watchdog(600), interrupt).train()
    interrupt.release()
    (record,) = [r for r in caplog.records if "jumped" in r.getMessage()]
    ids = order(60, 0, 0)[2 * 24 : 2 * 25].tolist()
    assert record.getMessage().endswith(f"at step 25; the last 24 steps set the limit at {limit(noise(24)):.4f}. "
                                        f"This rank's samples in that step: {ids[0]}, {ids[1]}")  # fmt: skip
