from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_fast.pipelines.sampler import Sampler, block_order, order, uniform

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


shard_of_each = st.lists(st.integers(0, 12), max_size=200).map(lambda numbers: np.array(numbers, dtype=np.uint32))


@given(shard_of_each, st.integers(1, 15), seeds, st.integers(0, 2000))
def test_a_block_order_reads_each_sample_once_and_few_shards_at_a_time(shards, block, seed, epoch):
    permutation = block_order(shards, block, seed, epoch)
    assert sorted(permutation) == list(range(len(shards)))
    assert np.array_equal(permutation, block_order(shards, block, seed, epoch)), "a pure function"
    sequence = shards[permutation].tolist()
    ends = {shard: (sequence.index(shard), len(sequence) - sequence[::-1].index(shard)) for shard in set(sequence)}
    for position in range(len(sequence)):
        assert sum(first <= position < last for first, last in ends.values()) <= block


@given(shard_of_each, seeds, st.integers(0, 2000))
def test_a_block_of_all_shards_is_the_order_without_blocks(shards, seed, epoch):
    assert np.array_equal(block_order(shards, 13, seed, epoch), order(len(shards), seed, epoch))


def test_a_block_order_is_pinned_for_all_time():
    shards = np.array([0, 1, 2, 3] * 3, dtype=np.uint32)
    assert block_order(shards, 1, seed=0, epoch=0).tolist() == [1, 9, 5, 10, 6, 2, 3, 7, 11, 4, 8, 0]
    assert block_order(shards, 2, seed=0, epoch=0).tolist() == [10, 1, 9, 6, 2, 5, 3, 4, 7, 8, 11, 0]


def test_shards_meet_in_other_blocks_and_in_another_order_each_epoch():
    shards = np.repeat(np.arange(6), 10)
    blocks = set()
    for epoch in range(20):
        sequence = shards[block_order(shards, 2, 0, epoch)]
        blocks |= {tuple(sorted(set(sequence[start : start + 20].tolist()))) for start in (0, 20, 40)}
    assert blocks == {(a, b) for a in range(6) for b in range(a + 1, 6)}, "every pair"


@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), seeds)
def test_ranks_and_resuming_are_those_of_every_order(data, world_size, share, block, seed):
    batch = world_size * share
    shards = np.array(data.draw(st.lists(st.integers(0, 5), min_size=batch, max_size=batch * 5)), dtype=np.uint32)
    n, start = len(shards), data.draw(st.integers(0, len(shards) // batch))
    ranks = [Sampler(n, batch, seed, rank, world_size, block=block, shards=shards) for rank in range(world_size)]
    steps = list(zip(*(rank.epoch(1, start) for rank in ranks), strict=True))
    read = [ids for shares in steps for own in shares for ids in own.ids.tolist()]
    assert read == block_order(shards, block, seed, 1)[start * batch : n // batch * batch].tolist()


def test_epochs_and_seeds_differ():
    orders = {tuple(order(100, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@given(st.data(), st.integers(1, 8), st.integers(1, 12), seeds)
def test_ranks_partition_the_global_batch(data, world_size, share, seed):
    batch = world_size * share
    n = data.draw(st.integers(batch, batch * 5))
    permutation = order(n, seed, 0)
    ranks = [Sampler(n, batch, seed, rank, world_size).epoch(0) for rank in range(world_size)]
    for step, shares in enumerate(zip(*ranks, strict=True)):
        slices = [share.ids for share in shares]
        assert all(len(ids) == share for ids in slices)
        assert np.array_equal(np.concatenate(slices), permutation[step * batch : (step + 1) * batch])
    assert step == n // batch - 1


@given(st.integers(1, 200), st.integers(1, 20), st.integers(0, 20))
def test_a_schedule_started_at_a_step_is_the_tail_of_the_epoch(n, batch, start):
    schedule = Sampler(n, batch, seed=3)
    whole = [share.ids.tolist() for share in schedule.epoch(1)]
    assert len(whole) == len(schedule) == n // batch
    if start <= len(schedule):
        assert [share.ids.tolist() for share in schedule.epoch(1, start)] == whole[start:]
    else:
        with pytest.raises(ValueError, match=f"start_step {start} lies outside an epoch of {len(schedule)}"):
            schedule.epoch(1, start)


@given(st.integers(1, 200), st.integers(1, 5), st.integers(1, 5))
def test_in_order_every_sample_is_read_once_by_one_rank_the_last_batch_perhaps_smaller(n, share, world_size):
    schedules = [Sampler(n, share * world_size, 3, rank, world_size, in_order=True) for rank in range(world_size)]
    read = [[s.ids.tolist() for s in schedule.epoch(2)] for schedule in schedules]
    assert sorted(i for rank in read for ids in rank for i in ids) == list(range(n))
    assert len(schedules[0]) == -(-n // (share * world_size))
    whole = n // (share * world_size)
    for k in range(whole):
        start = k * share * world_size
        assert [i for rank in read for i in rank[k]] == list(range(start, start + share * world_size))
    assert all(ids for rank in read for ids in rank), "no rank is given an empty batch"
    assert max(map(len, read)) == len(schedules[0])


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 5), st.integers(0, 5))
def test_with_repeats_an_epoch_is_as_long_and_shows_so_many_views_of_fewer_samples(n, batch, repeats, epoch):
    schedule = Sampler(n, batch, 3, repeats=repeats)
    shares = list(schedule.epoch(epoch))
    assert len(shares) == len(schedule) == n // batch
    seen = [pair for ids, draws in shares for pair in zip(ids.tolist(), draws.tolist(), strict=True)]
    assert len(set(seen)) == len(seen) == n // batch * batch
    firsts = order(n, 3, epoch)[: -(-len(seen) // repeats)]
    assert [i for i, _ in seen] == np.repeat(firsts, repeats)[: len(seen)].tolist()
    assert all(epoch * repeats <= view < (epoch + 1) * repeats for _, view in seen), "and no other epoch's"


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20), seeds)
def test_the_numbers_of_a_sample_depend_on_no_other_sample(ids, seed):
    together = uniform(seed, 5, ids, 4)
    alone = np.concatenate([uniform(seed, 5, [i], 4) for i in ids])
    assert np.array_equal(together, alone)
    assert np.array_equal(together[:, :2], uniform(seed, 5, ids, 2))


def test_the_numbers_are_uniform_and_uncorrelated():
    numbers = uniform(seed=1, draw_ids=2, sample_ids=np.arange(20_000), n=3)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = [np.histogram(column, bins=20, range=(0, 1))[0] for column in numbers.T]
    assert np.abs(np.array(counts) / 1000 - 1).max() < 0.15  # 4.7 sigma
    correlations = np.corrcoef(np.vstack([numbers.T, uniform(1, 3, np.arange(20_000), 3).T]))
    assert np.abs(correlations - np.eye(6)).max() < 0.04
