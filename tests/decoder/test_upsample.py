"""The merged upsampling is the two layers it stands for, to rounding."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spark_fast.decoder import UNetBlock
from spark_fast.decoder.upsample import merging_pays, upsample, upsample_and_convolve

size = st.integers(1, 5)


def two_steps(x, transposed, bias, weight):
    return F.conv2d(F.conv_transpose2d(x, transposed, bias, stride=2, padding=1), weight, padding=1)


def problem(batch, cin, between, cout, h, w, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (batch, cin, h, w), (cin, between, 4, 4), (between,), (cout, between, 3, 3)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@settings(max_examples=40)
@given(st.integers(1, 3), size, size, size, size, size)
def test_values_and_all_four_gradients(batch, cin, between, cout, h, w):
    inputs = problem(batch, cin, between, cout, h, w)
    merged, expected = upsample_and_convolve(*inputs), two_steps(*inputs)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-11)
    upstream = torch.randn_like(expected)
    got, wanted = (torch.autograd.grad(y, inputs, upstream) for y in (merged, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_before_a_norm_of_the_batch_the_map_has_no_gradient_along_its_channels_to_be_summed():
    inputs, norm = problem(2, 3, 4, 5, 3, 4), nn.BatchNorm2d(5, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    upstream = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    left_out, summed = (
        torch.autograd.grad(norm(upsample_and_convolve(*inputs, centred)), inputs, upstream)
        for centred in (True, False)
    )
    torch.testing.assert_close(left_out, summed, rtol=0, atol=1e-11)
    unlike = [torch.autograd.grad(upsample_and_convolve(*inputs, on), inputs[2], upstream)[0] for on in (True, False)]
    assert not torch.allclose(*unlike), "without the norm it has one"


@settings(max_examples=20)
@given(st.integers(1, 3), size, size, size, size)
def test_the_transposed_convolution_by_products_is_torchs(batch, cin, cout, h, w):
    x, weight, bias, _ = problem(batch, 8 * cin, cout, 1, h, w)  # few pixels, or many
    mine, torchs = upsample(x, weight, bias), F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
    torch.testing.assert_close(mine, torchs, rtol=0, atol=1e-12)
    upstream = torch.randn_like(torchs)
    got, wanted = (torch.autograd.grad(y, (x, weight, bias), upstream) for y in (mine, torchs))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


def test_under_autocast_it_is_as_close_to_the_truth_as_the_two_steps():
    inputs = problem(2, 32, 32, 32, 8, 8, torch.float32)
    truth = two_steps(*(t.double() for t in inputs))
    with torch.autocast("cpu", torch.bfloat16):
        errors = [(f(*inputs) - truth).square().mean().sqrt() for f in (upsample_and_convolve, two_steps)]
    assert errors[0] < 1.2 * errors[1]


def test_it_compiles_as_one_graph():
    inputs = problem(2, 3, 4, 5, 4, 6, torch.float32)
    compiled = torch.compile(upsample_and_convolve, fullgraph=True, backend="aot_eager")
    y, expected = compiled(*inputs), two_steps(*inputs)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    got, wanted = (torch.autograd.grad(z.square().mean(), inputs) for z in (y, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_a_block_merged_and_not_gives_the_same(training):
    block = UNetBlock(8, 4).double().train(training)
    nn.init.normal_(block.up_sample.bias)
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    outputs, statistics = [], []
    for block.merge in (False, True):
        block.conv[1].reset_running_stats()
        outputs.append(block(x))
        statistics.append(block.conv[1].running_mean.clone())
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-11)
    torch.testing.assert_close(*statistics, rtol=0, atol=1e-11)


def test_it_pays_for_many_pixels_and_few_channels_only():
    assert merging_pays(torch.empty(8, 48, 112, 112, device="meta"), 48)
    assert not merging_pays(torch.empty(8, 768, 7, 7, device="meta"), 768)
    assert merging_pays(torch.empty(1024, 768, 7, 7, device="meta"), 768)
