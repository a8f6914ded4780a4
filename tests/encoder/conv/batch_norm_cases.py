"""Batch norms by the GPU kernels against PyTorch's: on CUDA, or on the CPU by Triton's interpreter.

Run by `test_kernels`, as `kernel_cases` is.
"""

import copy

import pytest
import timm.layers as tl
import torch
import torch.nn.functional as F
from timm.models import resnet
from torch import nn
from torch.utils.checkpoint import checkpoint

from spark_fast.decoder import UNetBlock
from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.conv.kernels import batch_norm_operators as bn
from spark_fast.encoder.convert_network import PACKED, convert_layers
from spark_fast.encoder.layers import batch_norm
from spark_fast.encoder.layers.batch_norm import by_kernels, normalize
from tests.encoder.conv.kernel_cases import DEVICE, DTYPES, INTERPRETED, close, normal, packed, some_visible

LIMITS = {"": (), "relu": (0.0,), "relu6": (0.0, 6.0)}


def rows(n, c, dtype=torch.float32, mean=0.0, std=2.0, seed=0, side=1):
    x = (normal(n // side, c, side, 1, seed=seed) * std + mean).to(dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def compare(n, c, dtype, activation="", residual=False, affine=True, mean=0.0):
    """Outputs, running statistics and gradients beside PyTorch's in float64.

    No gradient comes from where the activation's input is at a limit to rounding, for there either side is right.
    """
    x, shortcut = rows(n, c, dtype, mean), rows(n, c, dtype, seed=1) if residual else None
    norm = nn.BatchNorm2d(c, momentum=0.3, affine=affine).to(DEVICE)
    running = [normal(c, seed=2), normal(c, seed=3).square()]
    norm.running_mean.copy_(running[0]), norm.running_var.copy_(running[1])
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    exact = copy.deepcopy(norm).double()
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, shortcut)]
    z = exact(wide[0]) if shortcut is None else exact(wide[0]) + wide[1]
    expected = F.relu(z) if activation == "relu" else F.relu6(z) if activation == "relu6" else z
    upstream = normal(*z.shape, dtype=dtype, seed=4)
    for limit in LIMITS[activation]:
        upstream = upstream.where((z - limit).abs() > (1e-3 + 1e-5 * abs(mean) if dtype == torch.float32 else 0.05), 0)
    y = by_kernels(norm, x, activation, shortcut, True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    close(y, expected, dtype, 1e-5 + 1e-7 * abs(mean))
    close(norm.running_mean, exact.running_mean, torch.float32)
    close(norm.running_var, exact.running_var, torch.float32)
    assert norm.num_batches_tracked == 1
    got = torch.autograd.grad(y, [t for t in (x, shortcut, *norm.parameters()) if t is not None], upstream)
    wanted = [t for t in (*wide, *exact.parameters()) if t is not None]
    # of few rows nothing remains of the gradient but a difference of terms of this size
    term = upstream.double().abs().max() * z.std((0, 2, 3)).max() / x.double().std((0, 2, 3)).min()
    for mine, right in zip(got, torch.autograd.grad(expected, wanted, upstream.double()), strict=True):
        assert mine.dtype == (x.dtype if right.dim() == 4 else torch.float32)
        tolerance = 1e-2 if mine.dtype == torch.bfloat16 else 2e-3 if mine.dtype == torch.float16 else 1e-5
        largest = torch.maximum(right.abs().max(), term)
        assert (mine - right).abs().max() <= (tolerance + 1e-6 * abs(mean)) * largest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", LIMITS)
@pytest.mark.parametrize("residual", [False, True])
def test_it_is_the_norm_of_pytorch_and_what_comes_after(residual, activation, dtype):
    compare(100, 33, dtype, activation, residual)  # neither rows nor channels are a multiple of the tiles


@pytest.mark.parametrize(("n", "c"), [(2, 1), (3, 200), (700, 7)])
def test_few_rows_and_many_few_channels_and_many(n, c):
    compare(n, c, torch.float32, "relu", True)


@pytest.mark.parametrize("residual", [False, True])
def test_runs_of_many_tiles_the_last_of_which_is_shorter(residual, monkeypatch):
    monkeypatch.setattr(bn, "TILE", 1024)
    monkeypatch.setattr(bn, "PROCESSORS", 1)
    assert bn._runs(890, 24, 3) == (32, 32, 10, 3)
    compare(890, 24, torch.float32, "relu6", residual, mean=50.0)


def test_without_weight_and_bias():
    compare(50, 8, torch.float32, "relu", True, affine=False)


def test_a_mean_far_above_the_deviation_leaves_the_variance_exact():
    """By squares less the square of the mean nothing would remain of it: 1e8 has no digit for 1 in fp32."""
    x = rows(4000, 16, mean=1e4, std=1.0).detach()
    mean, inverse = bn.batch_norm_statistics(x, None, None, None, 0.0, 0.0)
    exact = x.double()
    close(mean, exact.mean((0, 2, 3)), torch.float32, 1e-7)
    close(inverse, exact.var((0, 2, 3), correction=0).rsqrt(), torch.float32, 1e-6)


def test_what_is_no_number_stays_none():
    norm = nn.BatchNorm2d(2).to(DEVICE)
    x = rows(64, 2).detach()
    x[3, 1] = float("nan")
    x.requires_grad_()
    for activation in LIMITS:
        y = by_kernels(norm, x, activation, None, True)
        assert y[:, 1].isnan().all()
        assert y[:, 0].isfinite().all()
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert grad[:, 1].isnan().all()


def test_one_run_is_like_another_to_the_bit():
    results = []
    for _ in range(2):
        x, norm = rows(600, 24), nn.BatchNorm2d(24).to(DEVICE)
        y = by_kernels(norm, x, "relu", None, True)
        results.append([y, norm.running_var, *torch.autograd.grad(y.square().sum(), [x, *norm.parameters()])])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_running_statistics_are_kept_as_pytorch_keeps_them():
    ours, theirs = (nn.BatchNorm2d(5).to(DEVICE) for _ in range(2))
    for seed in (0, 1, 2):
        x = rows(20, 5, mean=seed, seed=seed).detach()
        close(by_kernels(ours, x, "", None, True), theirs(x), torch.float32)
    for mine, right in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, right)
    untracked = nn.BatchNorm2d(5, track_running_stats=False).to(DEVICE)
    close(by_kernels(untracked, x, "", None, True), untracked(x), torch.float32)


NETWORKS = {
    "BasicBlock": lambda: resnet.BasicBlock(8, 8),
    "Bottleneck": lambda: resnet.Bottleneck(8, 4, 2, resnet.downsample_conv(8, 16, 1, 2)),
    "squeeze-and-excite": lambda: resnet.Bottleneck(8, 2, attn_layer="se", drop_path=tl.DropPath(0.5)),
    "drop block": lambda: resnet.Bottleneck(8, 2, drop_block=lambda: nn.Dropout(0.0)),
    "BatchNormAct2d": lambda: nn.Sequential(tl.BatchNormAct2d(8), tl.BatchNormAct2d(8, act_layer=nn.SiLU)),
    "one after another": lambda: nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(True)),
    "seen by others": lambda: nn.Sequential(nn.BatchNorm2d(8), nn.SiLU(), nn.BatchNorm2d(8)),
}


def converted(name):
    torch.manual_seed(0)
    context, network = EncoderContext(dense=False), NETWORKS[name]()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight, 1), nn.init.normal_(norm.bias)
    return convert_layers(network, PACKED, context)[0].to(DEVICE, memory_format=torch.channels_last), context


def run(network, context, visible, kernels, call=None, dtype=torch.float32):
    context.visible, context.kernels = visible, kernels
    x = packed(visible, 8, 4, dtype)
    torch.manual_seed(1)
    y = (network if call is None else call)(x.clone())  # which a layer in place may overwrite
    grads = torch.autograd.grad(y, [x, *network.parameters()], normal(*y.shape, dtype=dtype, seed=1))
    return [y, *grads, *(b.clone() for b in network.buffers())]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_what_they_do_by_pytorch(name):
    visible = some_visible(keep=3)
    (first, context), (second, other) = converted(name), converted(name)
    got, expected = run(first, context, visible, True), run(second.double(), other, visible, False, dtype=torch.float64)
    for mine, right in zip(got, expected, strict=True):
        if mine.dtype == torch.int64:
            assert mine == right == 1
        else:
            close(mine, right, torch.float32, 1e-4 if INTERPRETED else 3e-2)  # a GPU multiplies in TF32


def launched(monkeypatch):
    """The activation and whether there is a residual, of each norm that the kernels compute."""
    found = []
    apply = batch_norm.gpu.batch_norm_apply
    monkeypatch.setattr(
        batch_norm.gpu, "batch_norm_apply", lambda *a: found.append((a[6], a[1] is not None)) or apply(*a)
    )
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BasicBlock", [("relu", False), ("relu", True)]),
        ("Bottleneck", [("relu", False), ("relu", False), ("", False), ("relu", True)]),
        ("squeeze-and-excite", [("relu", False), ("relu", False), ("", False)]),
        ("drop block", [("relu", False), ("", False), ("relu", True)]),
        ("BatchNormAct2d", [("relu", False), ("", False)]),
        ("one after another", [("relu6", False)]),
        ("seen by others", [("", False), ("", False)]),
    ],
)
def test_a_norm_is_computed_with_what_comes_after_it(name, expected, monkeypatch):
    network, context = converted(name)
    context.visible, context.kernels = some_visible(keep=2), True
    found = launched(monkeypatch)
    network(packed(context.visible, 8, 4))
    assert found == expected
    assert context.activated is None


def test_a_decoder_block_and_the_level_added_to_it(monkeypatch):
    torch.manual_seed(0)
    block = UNetBlock(8, 4).to(DEVICE, memory_format=torch.channels_last)
    x, level = normal(2, 8, 3, 3).requires_grad_(), normal(2, 4, 6, 6, seed=1).requires_grad_()
    upstream, results, found = normal(2, 4, 6, 6, seed=2), [], launched(monkeypatch)
    for kernels in (True, False):
        y = block(x, level, kernels)
        results.append([y, *torch.autograd.grad(y, [x, level, *block.parameters()], upstream)])
    assert found == [("relu6", False), ("", True)]
    norms = [p for m in block.modules() if isinstance(m, nn.BatchNorm2d) for p in (m.running_mean, m.running_var)]
    assert all(not torch.equal(p, torch.zeros_like(p)) for p in norms)
    largest = max(g.abs().max() for g in results[1][1:])
    for mine, right in zip(*results, strict=True):
        # the gradient of a bias before a norm is nothing but rounding
        assert (mine - right).abs().max() <= (1e-4 if INTERPRETED else 3e-2) * largest


def test_autocast_leaves_activations_in_bf16_and_weights_in_fp32():
    network, context = converted("Bottleneck")
    context.visible, context.kernels = some_visible(keep=2), True
    x = packed(context.visible, 8, 4)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = network(x)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().square().sum(), [x, *network.parameters()])
    assert {g.dtype for g in grads} == {torch.float32}
    assert network.bn3.running_var.dtype == torch.float32


def test_checkpointed_blocks_count_a_batch_twice_as_pytorch_does():
    for kernels in (True, False):
        (network, context), visible = converted("BasicBlock"), some_visible(keep=2)
        plain = run(network, context, visible, kernels)
        (network, context) = converted("BasicBlock")
        context.visible = visible
        again = run(network, context, visible, kernels, lambda x: checkpoint(network, x, use_reentrant=False))  # noqa: B023
        parameters = 2 + len(list(network.parameters()))
        for got, expected in zip(again[:parameters], plain[:parameters], strict=True):
            assert torch.equal(got, expected)
        assert network.bn1.num_batches_tracked == 2


@pytest.mark.parametrize("taken", [True, False])
def test_compiled_whole_they_give_the_same(taken, monkeypatch):
    monkeypatch.setattr(batch_norm, "IN_COMPILED_CODE", taken)
    visible, (network, context) = some_visible(keep=2), converted("BasicBlock")
    expected = run(network, context, visible, True)
    network, context = converted("BasicBlock")
    found = launched(monkeypatch)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    got = run(network, context, visible, True, compiled)
    assert len(found) == (2 if taken else 0)
    for mine, right in zip(got, expected, strict=True):
        close(mine, right, mine.dtype, 1e-4 if INTERPRETED else 1e-2) if mine.dtype != torch.int64 else None


def test_the_operators_are_what_torch_asks_of_operators():
    ops = torch.ops.spark_fast
    plain = [rows(12, 4).detach(), rows(12, 4, seed=1).detach(), normal(4), normal(4)]
    running = [normal(4, seed=2), normal(4, seed=3).square(), torch.tensor(0, device=DEVICE)]
    torch.library.opcheck(ops.batch_norm_statistics, (plain[0], *running, 0.1, 1e-5))
    torch.library.opcheck(ops.batch_norm_statistics, (plain[0], None, None, None, 0.0, 1e-5))
    mean, inverse = ops.batch_norm_statistics(plain[0], None, None, None, 0.0, 1e-5)
    torch.library.opcheck(ops.batch_norm_apply, (plain[0], plain[1], mean, inverse, *plain[2:], "relu"))
    torch.library.opcheck(ops.batch_norm_apply, (plain[0], None, mean, inverse, None, None, "relu6"))
    torch.library.opcheck(ops.batch_norm_apply, (plain[0], plain[1], mean, inverse, *plain[2:], ""))
    for y in (plain[1], None):
        torch.library.opcheck(ops.batch_norm_sums, (plain[1], plain[0], y, mean, inverse, *plain[2:], "relu"))
    sums = normal(2, 4, seed=5)
    operands = (plain[1], plain[0], mean, inverse, *plain[2:], sums, "relu")
    torch.library.opcheck(ops.batch_norm_input_gradient, operands)


@pytest.mark.skipif(INTERPRETED, reason="takes a GPU")
def test_a_cuda_graph_takes_them():
    network, context = converted("Bottleneck")
    context.visible, context.kernels = some_visible(), True
    x = packed(context.visible, 8, 4)

    def step():
        return torch.autograd.grad(network(x).square().sum(), [x, *network.parameters()])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(normal(*x.shape, seed=3))
    counted = int(network.bn1.num_batches_tracked)
    graph.replay()
    assert network.bn1.num_batches_tracked == counted + 1
    for got, expected in zip(captured, step(), strict=True):
        close(got, expected, torch.float32, 1e-2)


def test_normalize_goes_layer_by_layer_where_the_activation_is_another():
    norm, x = nn.BatchNorm2d(4).to(DEVICE), rows(12, 4)
    close(normalize(norm, nn.SiLU(), x, None, True), F.silu(norm(x)), torch.float32)
