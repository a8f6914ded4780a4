"""Batch norms by the kernels, in Triton's interpreter, for drawn shapes: run by `test_kernels`."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.encoder.conv.batch_norm_cases import LIMITS, compare


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 300),
    c=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    activation=st.sampled_from(sorted(LIMITS)),
    residual=st.booleans(),
    affine=st.booleans(),
    mean=st.sampled_from([0.0, -3.0, 100.0]),
)
def test_any_norm_is_that_of_pytorch(n, c, dtype, activation, residual, affine, mean):
    compare(n, c, dtype, activation, residual, affine, mean)
