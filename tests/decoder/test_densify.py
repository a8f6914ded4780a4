"""Projections from the visible cells are the dense ones, to rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spark_fast import build_spark
from spark_fast.decoder.densify import densify
from spark_fast.encoder import VisiblePatches
from spark_fast.masking import sample_visible

size = st.integers(1, 4)


def problem(batch=2, grid=(3, 4), keep=5, b=2, c=6, n=4, k=3, dtype=torch.float64):
    torch.manual_seed(0)
    visible = VisiblePatches(sample_visible(0, 0, torch.arange(batch), grid, keep), grid)
    x = torch.randn(visible.count, c, b, b, dtype=dtype).to(memory_format=torch.channels_last)
    project = nn.Conv2d(c, n, k, padding=k // 2).to(dtype)
    return (
        visible,
        project,
        (x.requires_grad_(), torch.randn(c, dtype=dtype, requires_grad=True), *project.parameters()),
    )


@settings(max_examples=40)
@given(size, size, size, st.integers(1, 16), st.sampled_from([1, 2, 4]), size, size, st.sampled_from([1, 3]))
def test_values_and_all_gradients(batch, h, w, keep, b, c, n, k):
    visible, project, inputs = problem(batch, (h, w), min(keep, h * w), b, c, n, k)
    sparse, dense = (densify(*inputs[:2], project, visible, sparse) for sparse in (True, False))
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-11)
    upstream = torch.randn_like(dense)
    got, wanted = (torch.autograd.grad(y, inputs, upstream) for y in (sparse, dense))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_under_autocast_it_is_as_close_to_the_truth_as_the_dense_projection():
    visible, project, inputs = problem(grid=(4, 4), keep=6, b=4, c=32, n=32, dtype=torch.float32)
    truth = densify(*inputs[:2], project, visible, False)
    with torch.autocast("cpu", torch.bfloat16):
        errors = [
            (densify(*inputs[:2], project, visible, sparse) - truth).square().mean().sqrt() for sparse in (True, False)
        ]
    assert errors[0] < 1.5 * errors[1]


def test_it_compiles_as_one_graph():
    visible, project, inputs = problem(dtype=torch.float32)

    def run(x, token):
        return densify(x, token, project, VisiblePatches(visible.index, visible.grid), True).square().mean()

    y, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs[:2]), run(*inputs[:2])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, inputs), torch.autograd.grad(expected, inputs))


@pytest.mark.parametrize("mask", [0.25, 0.6])
def test_the_loss_and_its_gradients_are_those_of_dense_projections(mask):
    torch.manual_seed(0)
    spark = build_spark("resnet10t", input_size=64, mask_ratio=mask, decoder_width=64, check=False).double()
    images, visible = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.arange(spark.num_visible).expand(2, -1)
    results = []
    for spark.sparse_projections in (False, True):
        loss = spark(images, visible)
        results.append((loss, torch.autograd.grad(loss, list(spark.parameters()))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)
