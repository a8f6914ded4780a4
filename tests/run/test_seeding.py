"""The seed of a step: the same for ever, and different for every (seed, step, rank)."""

from hypothesis import given
from hypothesis import strategies as st

from spark_fast.run.seeding import step_seed

RECORDED = [15793235383387715774, 12997252459554536576, 15233932005611902853]
number = st.integers(0, 2**31)


def test_values_are_those_of_earlier_versions():
    assert [step_seed(*key) for key in ((0, 0, 0), (1, 2, 3), (7, 10**6, 255))] == RECORDED


@given(st.lists(st.tuples(number, number, number), min_size=2, max_size=20, unique=True))
def test_different_keys_have_different_seeds_that_torch_takes(keys):
    seeds = [step_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
