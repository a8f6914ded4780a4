"""The t-test is Student's, and the smallest difference that it finds is that of the power tables."""

import numpy as np
import pytest


@pytest.fixture
def paired_test():
    import paired_test

    return paired_test


@pytest.mark.parametrize(
    ("t", "degrees", "p"), [(12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.571, 5, 0.05), (3.169, 10, 0.01)]
)
def test_the_tails_are_those_of_the_printed_tables(paired_test, t, degrees, p):
    assert paired_test.tail(t, degrees) == pytest.approx(p, rel=2e-3)
    assert paired_test.tail(-t, degrees) == paired_test.tail(t, degrees)


def test_three_differences_are_judged_by_their_mean_over_its_error(paired_test):
    assert paired_test.p_value([1.0, 2.0, 3.0]) == pytest.approx(0.0742, abs=1e-4)  # t = 3.464 with 2 degrees
    assert paired_test.p_value([1.0, 2.0, 3.0]) == paired_test.p_value([-1.0, -2.0, -3.0])
    assert paired_test.p_value([1.0, 1.0, 1.0]) == 0.0
    assert paired_test.p_value([5.0]) == 1.0


def test_a_difference_is_found_four_times_in_five(paired_test):
    drawn = np.random.default_rng(1).normal(paired_test.detectable(3), 1.0, (4000, 3))
    found = [paired_test.p_value(list(row)) < paired_test.LEVEL for row in drawn]
    assert sum(found) / len(found) == pytest.approx(paired_test.POWER, abs=0.02)
    assert paired_test.pairs_needed(1.0, 1.0) == 10  # as the power tables have it
    assert paired_test.pairs_needed(-0.5, 1.0) == 34
    assert paired_test.pairs_needed(0.0, 1.0) == float("inf")
