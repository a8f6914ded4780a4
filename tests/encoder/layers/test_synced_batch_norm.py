"""Batch statistics over ranks: two processes with half a batch each against one with all of it."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tests.processes  # noqa: F401
from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.convert_network import MASKED, PACKED, convert_layers
from spark_fast.encoder.layers import synced_batch_norm
from spark_fast.encoder.layers.synced_batch_norm import SyncedBatchNorm2d, SyncedBatchNormAct2d, sync_batch_norms

START = "forkserver"  # which has imported torch already: tests/processes.py
SHAPES = [(4, 3, 5, 2), (8, 16, 1, 1)]


def problem(shape, dtype, kind, options):
    torch.manual_seed(0)
    x, upstream = 3 * torch.randn(shape, dtype=dtype) + 5, torch.randn(shape, dtype=dtype)
    norm = kind(shape[1], **options).to(torch.promote_types(dtype, torch.float32))
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return x, upstream, norm


def results(norm, x, upstream):
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(upstream)
    own = [parameter.grad for parameter in norm.parameters()]  # sums over this rank's part
    return [y.detach(), x.grad, norm.running_mean, norm.running_var], own


def half(rank, rendezvous, folder, *of):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    x, upstream, norm = problem(*of)
    sync_batch_norms(norm)
    mine = slice(rank * len(x) // 2, (rank + 1) * len(x) // 2)
    torch.save(results(norm, x[mine], upstream[mine]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.BatchNorm2d, {}), (nn.BatchNorm2d, {"affine": False, "momentum": None}), (BatchNormAct2d, {})],
)
def test_two_ranks_compute_what_one_does(tmp_path, kind, options, shape, dtype, atol):
    words = tmp_path / "store", tmp_path, shape, dtype, kind, options
    mp.start_processes(half, words, nprocs=2, start_method=START)
    (one, one_own), (two, two_own) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    x, upstream, norm = problem(*words[2:])
    expected, sums = results(norm, x, upstream)
    for i in (0, 1):
        torch.testing.assert_close(torch.cat([one[i], two[i]]), expected[i], rtol=0, atol=atol)
    for i in (2, 3):
        torch.testing.assert_close(one[i], two[i], rtol=0, atol=0)
        torch.testing.assert_close(one[i], expected[i], rtol=1e-2 if dtype == torch.bfloat16 else 1e-12, atol=0)
    for a, b, c in zip(one_own, two_own, sums, strict=True):
        torch.testing.assert_close(a + b, c, rtol=0, atol=20 * atol)


class Waits(TorchDispatchMode):
    """The operators for which the host waits for a GPU."""

    found = ()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default):
            self.found += (op,)
        return op(*args, **(kwargs or {}))


@pytest.fixture
def one_rank(tmp_path, monkeypatch):
    """It computes as one of several."""
    monkeypatch.setattr(synced_batch_norm, "count_ranks", lambda: 2)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_no_step_has_the_host_wait_for_the_device_and_it_compiles_into_one_graph(kind, one_rank):
    """`torch.nn.SyncBatchNorm` looks up which ranks have brought images, in every norm, forward."""
    norm, x = kind(3), torch.randn(4, 3, 5, 2, requires_grad=True)
    sync_batch_norms(norm)
    with Waits() as waits:
        norm(x).square().sum().backward()
    assert not waits.found
    expected, norm.running_mean[:], x.grad = x.grad, 0, None
    torch.compile(norm, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize(
    ("kind", "synced"), [(nn.BatchNorm2d, SyncedBatchNorm2d), (BatchNormAct2d, SyncedBatchNormAct2d)]
)
def test_norms_keep_their_parameters_and_can_be_packed(kind, synced):
    network = nn.Sequential(kind(3), nn.Sequential(nn.Conv2d(3, 3, 1), kind(3)))
    before = dict(network.named_parameters())
    sync_batch_norms(network)
    assert [type(m) for m in network.modules() if isinstance(m, nn.BatchNorm2d)] == [synced] * 2
    assert all(p is before[name] for name, p in network.named_parameters())
    for kinds in (PACKED, MASKED):
        converted, _ = convert_layers(copy.deepcopy(network), kinds, EncoderContext(dense=False))
        assert isinstance(converted[0], synced)


def test_without_other_ranks_it_is_the_norm_of_torch():
    x, norm = torch.randn(4, 3, 5, 2), nn.BatchNorm2d(3)
    expected = copy.deepcopy(norm)(x)
    sync_batch_norms(norm)
    assert torch.equal(norm(x), expected)


def test_a_subclass_is_left_as_it_is():
    class Own(nn.BatchNorm2d):
        pass

    network = nn.Sequential(Own(3))
    sync_batch_norms(network)
    assert type(network[0]) is Own
