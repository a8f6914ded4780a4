"""Batch norms over two ranks by the GPU kernels, beside one rank with both batches: run by `test_kernels`."""

import copy

import pytest
import torch
from torch import nn

from spark_fast.encoder.conv.kernels import batch_norm_operators as bn
from spark_fast.encoder.conv.kernels import projected_norm_triton as projection
from spark_fast.encoder.layers import batch_norm, synced_batch_norm
from spark_fast.encoder.layers.batch_norm import by_kernels, projected
from spark_fast.encoder.layers.synced_batch_norm import sync_batch_norms
from tests.encoder.conv.kernel_cases import DEVICE, DTYPES, close, normal


def on_two_ranks(run, network, batches, monkeypatch):
    """`run(network, batch)` of each rank. The ranks run one after the other, so each is told what was sent in the round
    before: in the second round the statistics are right, in the third the sums of the gradients, too."""
    sent, results = {}, []

    def gathered(own):
        sent[rank, "moments"] = own
        return torch.stack([before.get((r, "moments"), own) for r in range(2)])

    def mean_over_ranks(own):
        sent[rank, "sums"] = own
        return torch.stack([before.get((r, "sums"), own) for r in range(2)]).mean(0)

    monkeypatch.setattr(synced_batch_norm, "count_ranks", lambda: 2)
    monkeypatch.setattr(batch_norm, "gathered", gathered)
    for module in (bn, projection):
        monkeypatch.setattr(module, "mean_over_ranks", mean_over_ranks)
    for _ in range(3):
        before, sent, results = sent, {}, []
        for rank, batch in enumerate(batches):  # noqa: B007
            own = copy.deepcopy(network)
            sync_batch_norms(own)
            results.append(run(own, batch))
    return results


def compare(run, network, batches, dtype, monkeypatch):
    """Outputs and gradients of the inputs of both ranks together, and the sums of what each finds for its weights."""
    parts = on_two_ranks(run, network, batches, monkeypatch)
    maps, weights, running = run(network, [torch.cat(both) for both in zip(*batches, strict=True)])
    for mine, right in zip(zip(*(part[0] for part in parts), strict=True), maps, strict=True):
        close(torch.cat(mine), right, dtype, 1e-5)
    for mine, right in zip(zip(*(part[1] for part in parts), strict=True), weights, strict=True):
        close(sum(mine), right, torch.float32, 1e-5 if dtype == torch.float32 else 1e-3)
    for mine, right in zip(zip(*(part[2] for part in parts), strict=True), running, strict=True):
        assert torch.equal(*mine)
        close(mine[0].float(), right.float(), torch.float32)


def batch(dtype, seed, mean):
    """x, a residual and the gradient of the output, of 300 rows of 33 channels."""
    x = [normal(75, 33, 2, 2, seed=seed + i) * 2 + (mean if i == 0 else 0) for i in range(3)]
    return [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in x]


def affine(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "residual"), [("", False), ("relu", False), ("relu", True)])
def test_a_norm_and_what_comes_after(activation, residual, dtype, monkeypatch):
    def run(norm, batch):
        x, shortcut, upstream = (t.clone().requires_grad_() for t in batch)
        y = by_kernels(norm, x, activation, shortcut if residual else None, True)
        maps = [x, shortcut] if residual else [x]
        found = torch.autograd.grad(y, [*maps, *norm.parameters()], upstream)
        return [y, *found[: len(maps)]], found[len(maps) :], [*norm.buffers()]

    torch.manual_seed(0)
    norm = affine(nn.BatchNorm2d(33, momentum=0.3))
    compare(run, norm, [batch(dtype, 0, 3.0), batch(dtype, 9, -2.0)], dtype, monkeypatch)


def test_a_norm_and_its_projection(monkeypatch):
    def run(layers, batch):
        x, upstream = batch[0].clone().requires_grad_(), batch[2][:, :3]
        y = projected(*layers, x, True)
        found = torch.autograd.grad(y, [x, *layers.parameters()], upstream)
        return [y, found[0]], found[1:], [*layers.buffers()]

    torch.manual_seed(0)
    layers = nn.Sequential(affine(nn.BatchNorm2d(33, momentum=0.3)), affine(nn.Conv2d(33, 3, 1)))
    compare(run, layers, [batch(torch.float32, 0, 3.0), batch(torch.float32, 9, -2.0)], torch.float32, monkeypatch)


def test_means_far_apart_leave_the_variance_exact():
    batches = [normal(50, 8, 2, 2, seed=i) + mean for i, mean in enumerate((1e3, 1e3 + 3))]
    x = [t.contiguous(memory_format=torch.channels_last) for t in batches]
    moments = torch.stack([bn.batch_norm_moments(t) for t in x])
    _, inverse = bn.batch_norm_merge(moments, None, None, None, 200, 0.0, 0.0)
    exact = torch.cat(x).double().var((0, 2, 3), correction=0).rsqrt()
    close(inverse, exact, torch.float32, 1e-4)  # a mean of 1000 is kept to 6e-5


def test_the_operators_are_what_torch_asks_of_operators():
    ops, x = torch.ops.spark_fast, batch(torch.float32, 0, 0.0)[0]
    torch.library.opcheck(ops.batch_norm_moments, (x,))
    moments = torch.stack([ops.batch_norm_moments(x)] * 2)
    running = [normal(33, seed=2), normal(33, seed=3).square(), torch.tensor(0, device=DEVICE)]
    torch.library.opcheck(ops.batch_norm_merge, (moments, *running, 300, 0.1, 1e-5))
    torch.library.opcheck(ops.batch_norm_merge, (moments, None, None, None, 300, 0.0, 1e-5))
