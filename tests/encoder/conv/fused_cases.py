"""The kernels of norms, activations and residuals against PyTorch in float64: on CUDA, or by Triton's interpreter.

Not collected by name, as `kernel_cases`: `test_kernels` runs both, and interpreted `fused_properties`, which draws more
cases.
"""

import copy
import os

import pytest
import timm.layers as tl
import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXtBlock
from torch import nn

from spark_fast.encoder import VisiblePatches
from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.conv import kernels as gpu
from spark_fast.encoder.conv.kernels import tile
from spark_fast.encoder.convert_network import MASKED, PACKED, convert_layers
from spark_fast.masking import sample_visible

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF, FULL = torch.bfloat16, torch.float32
OPS = torch.ops.spark_fast
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def normal(*shape, dtype=torch.float32, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype).requires_grad_()


def results(function, inputs, upstream):
    """Output and gradients of those inputs that are there."""
    out = function(*inputs)
    there = [t for t in inputs if t is not None and t.requires_grad]
    return [out, *torch.autograd.grad(out, there, upstream.to(out.dtype))]


def in_float64(tensors):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def check(got, expected, dtypes):
    """Each as exact as its dtype, relative to its largest value."""
    for mine, right, dtype in zip(got, expected, dtypes, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == right.shape
        if mine.numel():
            difference = (mine.double() - right).abs().max()
            assert difference <= TOLERANCE[dtype] * right.abs().max().clamp(min=1e-3), (difference, dtype)


def compare_layer_norm(shape, dtype, out, parts, mean):
    """Output and gradients, with weight and bias or without (`parts`), around a mean."""
    c = shape[-1]
    x = (normal(*shape, dtype=dtype).detach() + mean).requires_grad_()
    weight, bias = (normal(c, seed=1 + i) if there else None for i, there in enumerate(parts))
    upstream = normal(*shape, dtype=out, seed=3).detach()
    got = results(lambda *t: gpu.layer_norm(*t, 1e-3, out), [x, weight, bias], upstream)
    expected = results(lambda *t: F.layer_norm(t[0], (c,), *t[1:], 1e-3), in_float64([x, weight, bias]), upstream)
    check(got, expected, [out, dtype, *[torch.float32] * sum(parts)])


@pytest.mark.parametrize(
    ("shape", "dtype", "out", "parts"),
    [
        ((2, 7, 96), HALF, HALF, (True, True)),
        ((3, 1, 130), HALF, FULL, (True, True)),
        ((1, 7, 40), FULL, HALF, (True, False)),
        ((2, 2, 3), torch.float16, torch.float16, (False, False)),
        ((1, 2, 2816), HALF, HALF, (True, True)),
    ],
)
def test_layer_norm_and_its_gradients(shape, dtype, out, parts):
    compare_layer_norm(shape, dtype, out, parts, mean=3.0)


def compare_response_norm(images, cells, c, dtype, scale=1.0):
    """timm's layer on (images, cells, 1, C)."""
    x = (normal(images * cells, c, dtype=dtype).detach() * scale).requires_grad_()
    inputs, upstream = (
        [x, normal(c, seed=1), normal(c, seed=2)],
        normal(images * cells, c, dtype=dtype, seed=3).detach(),
    )

    def plain(x, weight, bias):
        layer = GlobalResponseNorm(c)
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, (x.view(images, cells, 1, c),)).view(x.shape)

    got = results(lambda *t: gpu.response_norm(*t, 1e-6, images), inputs, upstream)
    check(got, results(plain, in_float64(inputs), upstream), [dtype, dtype, FULL, FULL])


@pytest.mark.parametrize(
    ("images", "cells", "c", "dtype"),
    [(2, 7, 96, HALF), (3, 1, 130, FULL), (1, 40, 5, torch.float16), (2, 700, 8, HALF)],
)
def test_response_norm_and_its_gradients(images, cells, c, dtype, monkeypatch):
    monkeypatch.setattr(tile, "WAVES", 4)  # the last: runs of tiles, which end inside an image
    compare_response_norm(images, cells, c, dtype)


def test_a_channel_that_is_zero_has_no_response_and_a_finite_gradient():
    x = torch.zeros(6, 4, device=DEVICE).requires_grad_()
    out, *grads = results(
        lambda *t: gpu.response_norm(*t, 1e-6, 2), [x, normal(4), normal(4)], torch.ones(6, 4).to(DEVICE)
    )
    assert torch.equal(grads[0], torch.ones_like(x))
    assert torch.equal(grads[2], torch.full_like(grads[2], 6))
    assert out.isfinite().all()
    assert not grads[1].any()


def test_a_mean_far_beyond_the_deviation_costs_no_digits():
    """Of 1000 +- 1 in fp32: the mean of squares less the square of the mean would keep two."""
    x = (normal(5, 96).detach() + 1000).requires_grad_()
    upstream = normal(5, 96, seed=1).detach()
    got = results(lambda t: gpu.layer_norm(t, None, None, 1e-6, torch.float32), [x], upstream)
    check(got, results(lambda t: F.layer_norm(t, (96,)), in_float64([x]), upstream), [torch.float32] * 2)


def compare_gelu(shape, dtype, scale):
    x = (normal(*shape, dtype=dtype).detach() * scale).requires_grad_()
    inputs, upstream = [x, normal(shape[-1], seed=1)], normal(*shape, dtype=dtype, seed=2).detach()
    expected = results(lambda x, bias: F.gelu(x + bias), in_float64(inputs), upstream)
    check(results(gpu.gelu_of_sum, inputs, upstream), expected, [dtype, dtype, FULL])


@pytest.mark.parametrize(("shape", "dtype"), [((2, 7, 96), HALF), ((3, 1, 130), FULL), ((1, 1, 1), torch.float16)])
def test_gelu_of_a_sum_and_its_gradients(shape, dtype):
    compare_gelu(shape, dtype, scale=3.0)


def compare_residual(shape, dtype, stream, parts):
    """With bias, gamma and the factor of stochastic depth, or without (`parts`)."""
    c = shape[-1]
    bias, gamma = (normal(c, seed=1 + i) if parts[i] else None for i in range(2))
    factor = (torch.arange(shape[0], device=DEVICE) % 2 * 1.25) if parts[2] else None
    inputs = [normal(*shape, dtype=dtype), bias, gamma, factor, normal(*shape, dtype=stream, seed=3)]

    def plain(x, bias, gamma, factor, shortcut):
        x = x if bias is None else x + bias
        x = x if gamma is None else x * gamma
        return shortcut + (x if factor is None else x * factor[:, None, None])

    out = FULL if parts[1] else torch.promote_types(dtype, stream)
    upstream = normal(*shape, dtype=out, seed=4).detach()
    expected = results(plain, in_float64(inputs), upstream)
    grads = [dtype, *[FULL] * (parts[0] + parts[1]), stream]
    check(results(gpu.scaled_residual, inputs, upstream), expected, [out, *grads])


@pytest.mark.parametrize(
    ("shape", "dtype", "stream", "parts"),
    [
        ((2, 7, 96), HALF, FULL, (True, True, True)),
        ((3, 1, 130), HALF, FULL, (True, False, False)),
        ((1, 7, 40), HALF, HALF, (False, True, False)),
        ((2, 2, 3), torch.float16, torch.float16, (False, False, True)),
    ],
)
def test_a_scaled_residual_and_its_gradients(shape, dtype, stream, parts):
    compare_residual(shape, dtype, stream, parts)


@pytest.mark.parametrize("rows", [0, 700])
def test_no_rows_and_more_tiles_than_programs(rows, monkeypatch):
    """Each program then goes over a run of tiles, the last beyond the end."""
    monkeypatch.setattr(tile, "WAVES", 2)
    assert tile.column_runs(3, 1) == (2, 2)
    x, weight, bias = normal(rows, 8, dtype=HALF), normal(8, seed=1), normal(8, seed=2)
    upstream = normal(rows, 8, dtype=HALF, seed=3).detach()
    norm = results(lambda *t: gpu.layer_norm(*t, 1e-6, HALF), [x, weight, bias], upstream)
    gelu = results(gpu.gelu_of_sum, [x, bias], upstream)
    tail = results(lambda *t: gpu.scaled_residual(t[0], t[1], t[2], None, t[0]), [x, bias, weight], upstream)
    plain = in_float64([x, weight, bias])
    sums = [torch.float32] * 2
    check(norm, results(lambda *t: F.layer_norm(t[0], (8,), *t[1:], 1e-6), plain, upstream), [HALF, HALF, *sums])
    expected = results(lambda x, bias: F.gelu(x + bias), [plain[0], plain[2]], upstream)
    check(gelu, expected, [HALF, HALF, torch.float32])
    expected = results(lambda x, bias, gamma: x + gamma * (x + bias), [plain[0], plain[2], plain[1]], upstream)
    check(tail, expected, [torch.float32, HALF, *sums])


def test_one_run_is_like_another_to_the_bit():
    x, weight, bias = normal(99, 40, dtype=HALF), normal(40, seed=1), normal(40, seed=2)
    upstream = normal(99, 40, dtype=HALF, seed=3).detach()
    runs = [results(lambda *t: gpu.layer_norm(*t, 1e-6, HALF), [x, weight, bias], upstream) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_the_operators_are_what_torch_asks_of_operators():
    x, grad = normal(2, 3, 8, dtype=HALF).detach(), normal(2, 3, 8, dtype=HALF, seed=1).detach()
    weight, bias, factor = normal(8, seed=2).detach(), normal(8, seed=3).detach(), torch.ones(2, device=DEVICE)
    for norm in ((weight, bias), (None, None)):
        torch.library.opcheck(OPS.layer_norm, (x, *norm, 1e-6, HALF))
    torch.library.opcheck(OPS.gelu_of_sum, (x, bias))
    torch.library.opcheck(OPS.response_norm, (x, weight, bias, 1e-6, 2))
    for parts in ((bias, weight, factor), (None, None, None)):
        torch.library.opcheck(OPS.scaled_residual, (x, *parts, normal(2, 3, 8, seed=4).detach()))
    torch.library.opcheck(OPS.layer_norm_gradients, (grad, x, weight, 1e-6))
    torch.library.opcheck(OPS.response_norm_gradients, (grad, x, weight, 1e-6, 2))
    torch.library.opcheck(OPS.gelu_of_sum_gradients, (grad, x, bias))
    torch.library.opcheck(OPS.scaled_residual_gradients, (grad, x, bias, weight, factor))


def test_compiled_whole_they_give_the_same():
    def network(x, weight, bias):
        rows = gpu.gelu_of_sum(gpu.layer_norm(x, weight, bias, 1e-6, HALF), bias)
        rows = gpu.response_norm(rows, weight, bias, 1e-6, 1)
        return gpu.scaled_residual(rows, bias, weight, None, x)

    inputs, upstream = [normal(5, 8), normal(8, seed=1), normal(8, seed=2)], normal(5, 8, seed=3).detach()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    for got, expected in zip(results(compiled, inputs, upstream), results(network, inputs, upstream), strict=True):
        assert torch.equal(got, expected)


BLOCKS = {
    "V1": {"ls_init_value": 0.5},
    "V1, stochastic depth": {"ls_init_value": 0.5, "drop_path": 0.5},
    "V2": {"ls_init_value": None, "use_grn": True},
    "V1, convolutions": {"ls_init_value": 0.5, "conv_mlp": True},
    "V2, convolutions": {"ls_init_value": None, "use_grn": True, "conv_mlp": True},
}


def block_of(table, options, kernels, seed=0):
    """A ConvNeXt block on the visible patches of two images, its constants drawn anew."""
    torch.manual_seed(seed)
    block = ConvNeXtBlock(8, kernel_size=3, **options).to(DEVICE)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    visible = VisiblePatches(sample_visible(0, 0, torch.arange(2), (2, 2), 3).to(DEVICE), (2, 2))
    context = EncoderContext(dense=table is MASKED)
    block, _ = convert_layers(block, table, context)
    context.visible, context.kernels = visible, kernels
    return block, visible


def run_block(block, x, autocast=True):
    torch.manual_seed(1)  # of stochastic depth
    with torch.autocast(DEVICE, HALF, enabled=autocast):
        y = block(x)
    upstream = normal(*y.shape, seed=5).detach()
    return [y, *torch.autograd.grad(y, [x, *block.parameters()], upstream)]


@pytest.mark.parametrize("name", BLOCKS)
def test_a_convnext_block_is_pytorchs(name, monkeypatch):
    """To the rounding of bf16; output and gradients stay fp32, as the residual stream is."""
    launched = set()
    for kernel in ("layer_norm", "gelu_of_sum", "response_norm", "scaled_residual"):
        op = getattr(gpu, kernel)
        monkeypatch.setattr(gpu, kernel, lambda *a, kernel=kernel, op=op: launched.add(kernel) or op(*a))
    block, visible = block_of(PACKED, BLOCKS[name], kernels=True)
    x = normal(visible.count, 8, 2, 2, seed=4).detach().to(memory_format=torch.channels_last).requires_grad_()
    fused = run_block(block, x)
    grn = {"response_norm"} if "V2" in name else set()
    assert launched == {"layer_norm", "gelu_of_sum", "scaled_residual", *grn}
    assert block.norm.rounded
    launched.clear()
    block.context.kernels = False
    exact = run_block(block, x, autocast=False)
    assert not launched
    for mine, right in zip(fused, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - right).norm() <= 0.02 * right.norm()


def test_a_norm_is_rounded_only_where_what_follows_would_round_it():
    layers = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 4, 4), tl.LayerNorm2d(8)), nn.Sequential(tl.LayerNorm2d(8), nn.Conv2d(8, 8, 2, 2))
    ).to(DEVICE)
    plain = copy.deepcopy(layers)
    context = EncoderContext(dense=False)
    layers, _ = convert_layers(layers, PACKED, context)
    context.kernels = True
    x = normal(2, 8, 4, 4, dtype=HALF).detach()
    with torch.autocast(DEVICE, HALF):
        stem, down = layers[0][1](x), layers[1][0](x)
    expected = plain[0][1](x.float())
    assert stem.dtype == torch.float32
    torch.testing.assert_close(stem, expected)
    assert down.dtype == HALF
    torch.testing.assert_close(down, expected.to(HALF), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(
    ("table", "kernels", "autocast"), [(PACKED, False, True), (PACKED, True, False), (MASKED, True, True)]
)
def test_without_kernels_or_autocast_or_packing_a_block_is_timms(table, kernels, autocast, monkeypatch):
    for kernel in ("layer_norm", "gelu_of_sum", "scaled_residual"):
        monkeypatch.delattr(gpu, kernel)
    block, visible = block_of(table, BLOCKS["V1"], kernels)
    x = normal(visible.count if table is PACKED else 2, 8, 2, 2, seed=4)
    with torch.autocast(DEVICE, HALF, enabled=autocast):
        assert torch.equal(block(x), ConvNeXtBlock.forward(block, x))
