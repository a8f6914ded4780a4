"""Casts that autocast makes for a convolution, made for functions of our own."""

import pytest
import torch
import torch.nn.functional as F

from spark_fast.autograd import cast_for_autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_get_the_dtype_that_a_convolution_would_compute_in(dtype):
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3)
    with torch.autocast("cpu", dtype):
        assert [t.dtype for t in cast_for_autocast(x, weight)] == [F.conv2d(x, weight).dtype] * 2 == [dtype] * 2


def test_without_autocast_on_the_meta_device_and_in_float64_they_are_left_alone():
    x, nowhere, double = torch.randn(2), torch.empty(2, device="meta"), torch.randn(2, dtype=torch.float64)
    assert cast_for_autocast(x)[0] is x
    with torch.autocast("cpu", torch.bfloat16):
        assert cast_for_autocast(nowhere)[0] is nowhere
        assert cast_for_autocast(double)[0] is double
        assert cast_for_autocast(x)[0].dtype == torch.bfloat16
