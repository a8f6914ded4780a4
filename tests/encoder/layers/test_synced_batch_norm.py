"""Batch statistics over ranks: two processes with half a batch each against one with all of it."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import tests.processes  # noqa: F401
from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.convert_network import PACKED, convert_layers
from spark_fast.encoder.layers.synced_batch_norm import HostSyncBatchNorm

START = "forkserver"  # which has imported torch already: tests/processes.py
SHAPES = [(4, 3, 5, 2), (8, 16, 1, 1)]


def problem(shape, dtype):
    torch.manual_seed(0)
    x, upstream = 3 * torch.randn(shape, dtype=dtype) + 5, torch.randn(shape, dtype=dtype)
    norm = nn.BatchNorm2d(shape[1]).to(torch.promote_types(dtype, torch.float32))
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return x, upstream, norm


def results(norm, x, upstream):
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(upstream)
    own = [norm.weight.grad, norm.bias.grad]  # sums over this rank's part
    return [y.detach(), x.grad, norm.running_mean, norm.running_var], own


def half(rank, rendezvous, folder, shape, dtype):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    x, upstream, norm = problem(shape, dtype)
    holder = nn.Sequential(norm)
    HostSyncBatchNorm.replace_in(holder)
    mine = slice(rank * shape[0] // 2, (rank + 1) * shape[0] // 2)
    torch.save(results(holder[0], x[mine], upstream[mine]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
def test_two_ranks_compute_what_one_does(tmp_path, shape, dtype, atol):
    words = tmp_path / "store", tmp_path, shape, dtype
    mp.start_processes(half, words, nprocs=2, start_method=START)
    (one, one_own), (two, two_own) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    x, upstream, norm = problem(shape, dtype)
    expected, sums = results(norm, x, upstream)
    for i in (0, 1):
        torch.testing.assert_close(torch.cat([one[i], two[i]]), expected[i], rtol=0, atol=atol)
    for i in (2, 3):
        torch.testing.assert_close(one[i], two[i], rtol=0, atol=0)
        torch.testing.assert_close(one[i], expected[i], rtol=1e-2 if dtype == torch.bfloat16 else 1e-12, atol=0)
    for a, b, c in zip(one_own, two_own, sums, strict=True):
        torch.testing.assert_close(a + b, c, rtol=0, atol=20 * atol)


def test_norms_of_a_packed_encoder_are_replaced_too():
    packed, _ = convert_layers(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), PACKED, EncoderContext(dense=False))
    weight = packed[0].weight
    HostSyncBatchNorm.replace_in(packed)
    assert type(packed[0]) is HostSyncBatchNorm
    assert packed[0].weight is weight
