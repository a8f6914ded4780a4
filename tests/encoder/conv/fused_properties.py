"""The comparisons of `fused_cases` for shapes, dtypes and parts that hypothesis draws, by Triton's interpreter."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from tests.encoder.conv.fused_cases import compare_gelu, compare_layer_norm, compare_residual, compare_response_norm

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
shapes = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 7]), st.sampled_from([1, 3, 8, 40, 96, 130]))
some = settings(deadline=None, max_examples=15)


@some
@given(shapes, dtypes, dtypes, st.tuples(st.booleans(), st.booleans()), st.floats(-30, 30))
def test_layer_norm_and_its_gradients(shape, dtype, out, parts, mean):
    compare_layer_norm(shape, dtype, out, parts, mean)


@some
@given(shapes, dtypes, st.sampled_from([0.1, 1.0, 6.0]))
def test_gelu_of_a_sum_and_its_gradients(shape, dtype, scale):
    compare_gelu(shape, dtype, scale)


@some
@given(shapes, dtypes, dtypes, st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_a_scaled_residual_and_its_gradients(shape, dtype, stream, parts):
    compare_residual(shape, dtype, stream, parts)


@some
@given(st.integers(1, 3), st.sampled_from([1, 2, 7]), st.sampled_from([1, 3, 8, 96, 130]), dtypes, st.floats(0.1, 10))
def test_response_norm_and_its_gradients(images, cells, c, dtype, scale):
    compare_response_norm(images, cells, c, dtype, scale)
