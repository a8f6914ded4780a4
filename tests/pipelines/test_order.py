from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.order import Schedule, batch_ids, order, uniform

seeds = st.integers(0, 2**32)


@given(st.integers(0, 500), seeds, st.integers(0, 2000))
def test_an_order_is_a_permutation_and_a_pure_function(n, seed, epoch):
    permutation = order(n, seed, epoch)
    assert sorted(permutation) == list(range(n))
    assert np.array_equal(permutation, order(n, seed, epoch))


def test_the_order_is_pinned_for_all_time():
    assert order(10, seed=0, epoch=0).tolist() == [3, 1, 9, 6, 2, 4, 7, 8, 0, 5]
    assert uniform(0, 0, [0, 1], 2).tolist() == [
        [0.48372896864433657, 0.09243864600372742],
        [0.2925178485036296, 0.992924263245783],
    ]


def test_epochs_and_seeds_differ():
    orders = {tuple(order(100, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@given(st.data(), st.integers(1, 8), st.integers(1, 12), seeds)
def test_ranks_partition_the_global_batch(data, world_size, share, seed):
    batch = world_size * share
    n = data.draw(st.integers(batch, batch * 5))
    permutation = order(n, seed, 0)
    for step in range(n // batch):
        slices = [batch_ids(permutation, step, batch, rank, world_size) for rank in range(world_size)]
        assert all(len(ids) == share for ids in slices)
        assert np.array_equal(np.concatenate(slices), permutation[step * batch : (step + 1) * batch])


@given(st.integers(1, 200), st.integers(1, 20), st.integers(0, 20))
def test_a_schedule_started_at_a_step_is_the_tail_of_the_epoch(n, batch, start):
    schedule = Schedule(n, batch, seed=3)
    whole = [ids.tolist() for ids in schedule.epoch(1)]
    assert len(whole) == len(schedule) == n // batch
    if start <= len(schedule):
        assert [ids.tolist() for ids in schedule.epoch(1, start)] == whole[start:]
    else:
        with pytest.raises(ValueError, match=f"start_step {start} lies outside an epoch of {len(schedule)}"):
            schedule.epoch(1, start)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20), seeds)
def test_the_numbers_of_a_sample_depend_on_no_other_sample(ids, seed):
    together = uniform(seed, 5, ids, 4)
    alone = np.concatenate([uniform(seed, 5, [i], 4) for i in ids])
    assert np.array_equal(together, alone)
    assert np.array_equal(together[:, :2], uniform(seed, 5, ids, 2))


def test_the_numbers_are_uniform_and_uncorrelated():
    numbers = uniform(seed=1, epoch=2, sample_ids=np.arange(20_000), n=3)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = [np.histogram(column, bins=20, range=(0, 1))[0] for column in numbers.T]
    assert np.abs(np.array(counts) / 1000 - 1).max() < 0.15  # 4.7 sigma
    correlations = np.corrcoef(np.vstack([numbers.T, uniform(1, 3, np.arange(20_000), 3).T]))
    assert np.abs(correlations - np.eye(6)).max() < 0.04
