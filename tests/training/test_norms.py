"""Norms by rows are norms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spark_fast.training.lamb import norms

shapes = st.lists(st.lists(st.integers(1, 7), max_size=4), min_size=1, max_size=5)
pytestmark = pytest.mark.usefixtures("one_thread")


@given(shapes, st.integers(0, 1000), st.sampled_from([1e-18, 1.0, 1e18]), st.booleans())
def test_each_is_the_root_of_the_sum_of_squares(shapes, seed, scale, channels_last):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) * scale for shape in shapes]
    if channels_last:
        tensors = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    expected = [math.sqrt(math.fsum(x * x for x in t.flatten().tolist())) for t in tensors]
    torch.testing.assert_close(norms(tensors), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_finite_number_shows_in_its_own_norm_alone(bad):
    tensors = [torch.ones(4, 3), torch.ones(4, 3), torch.ones(5)]
    tensors[1][2, 1] = bad
    assert norms(tensors).isfinite().tolist() == [True, False, True]
