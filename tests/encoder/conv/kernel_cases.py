"""The GPU kernels against PyTorch: on CUDA, or on the CPU by Triton's interpreter.

Not collected by name: `test_kernels` runs this file in a process of its own, because Triton decides when it is imported
whether to interpret.
"""

import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spark_fast.encoder import VisiblePatches
from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.conv import kernels as gpu
from spark_fast.encoder.conv.convolve import convolve, gather_windows
from spark_fast.encoder.conv.geometry import Axis, layer_axes
from spark_fast.encoder.conv.kernels import tile
from spark_fast.encoder.convert_network import PACKED, convert_layers
from spark_fast.masking import sample_visible

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
cuda = pytest.mark.skipif(INTERPRETED, reason="takes a GPU")
DTYPES = [torch.float32, torch.bfloat16] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
OPS = torch.ops.spark_fast


def some_visible(grid=(3, 4), batch=2, keep=5):
    """Each image another mask, most patches without some of their neighbours."""
    index = sample_visible(0, 0, torch.arange(batch), grid, keep)
    assert batch == 1 or len(index.unique(dim=0)) > 1
    return VisiblePatches(index.to(DEVICE), grid)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def packed(visible, c, b, dtype=torch.float32):
    return normal(visible.count, c, b, b, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()


def close(got, expected, dtype, scale=1e-5):
    """Relative to the largest: sums of many terms are as exact as their largest term."""
    tolerance = {torch.float32: scale, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert got.shape == expected.shape
    assert got.dtype == dtype
    difference = (got.double() - expected.double()).abs().max()
    assert difference <= tolerance * expected.double().abs().max(), difference


WINDOWS = [  # b, channels, y, x
    (4, 40, Axis(3, 1, 1, 1, 1), Axis(3, 1, 1, 1, 1)),
    (1, 6, Axis(3, 1, 1, 1, 1), Axis(3, 1, 1, 1, 1)),
    (2, 3, Axis(3, 2, 1, 1, 1), Axis(3, 2, 1, 1, 1)),
    (4, 32, Axis(3, 2, 1, 0, 1), Axis(1, 2, 1, 0, 0)),  # asymmetric; the last column is not looked at
    (2, 5, Axis(5, 1, 1, 2, 2), Axis(1, 1, 1, 0, 0)),  # the whole neighbour, along one axis
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "c", "y", "x"), WINDOWS)
@pytest.mark.parametrize("fill", [0.0, float("-inf")])
def test_windows_and_their_sum(b, c, y, x, fill, dtype):
    visible, cells = some_visible(), None
    runs = []
    for kernels in (True, False):
        cells = packed(visible, c, b, dtype)
        windows = gather_windows(cells, (y, x), visible, fill, kernels)
        upstream = normal(*windows.shape, dtype=dtype, seed=1)
        runs.append((windows, *torch.autograd.grad(windows, cells, upstream)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][0].is_contiguous(memory_format=torch.channels_last)
    close(runs[0][1], runs[1][1], dtype)


DEPTHWISE = [  # b, channels, kernel, stride, dilation, grid
    (8, 5, 7, 1, 1, (1, 3)),
    (4, 32, 7, 1, 1, (1, 3)),
    (2, 33, 7, 1, 1, (3, 4)),
    (1, 7, 7, 1, 1, (4, 5)),
    (4, 6, 5, 2, 1, (3, 4)),
    (2, 6, 3, 2, 1, (3, 4)),
    (2, 4, 3, 1, 2, (3, 4)),
    (4, 4, (1, 5), 1, 1, (3, 4)),
    (1, 4, (11, 1), 1, 1, (3, 4)),
    (16, 5, 3, 1, 1, (1, 3)),  # more cells side by side than a thread computes
    (16, 4, 3, 2, 1, (1, 3)),
    (10, 4, 3, 1, 2, (1, 3)),
    (11, 4, (1, 13), 1, 1, (1, 3)),  # one output a thread, and fewer channels
]


def depthwise_layer(c, kernel, stride, dilation, bias=True):
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = tuple(dilation * (k - 1) // 2 for k in kernel)
    torch.manual_seed(0)
    return nn.Conv2d(c, c, kernel, stride, padding, dilation, groups=c, bias=bias).to(DEVICE)


def gradients(layer, visible, b, algorithm, dtype, compute=None, kernels=False):
    """Output and gradients (x, weight, bias) of a layer rounded to `dtype` and computed in `compute`."""
    parameters = [p.detach().to(dtype).to(compute or dtype).requires_grad_() for p in layer.parameters()]
    x = packed(visible, layer.in_channels, b, dtype).detach().to(compute or dtype).requires_grad_()
    bias = parameters[1] if parameters[1:] else None
    y = convolve(x, parameters[0], bias, layer_axes(layer), layer.groups, visible, algorithm, kernels)
    upstream = normal(*y.shape, dtype=dtype, seed=1).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *parameters], upstream)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "c", "kernel", "stride", "dilation", "grid"), DEPTHWISE)
def test_depthwise_and_its_gradients(b, c, kernel, stride, dilation, grid, dtype):
    visible = some_visible(grid, batch=1 if b >= 8 else 2, keep=2 if grid == (1, 3) else 3)
    layer = depthwise_layer(c, kernel, stride, dilation, bias=b != 2)
    got = gradients(layer, visible, b, "direct", dtype)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    for mine, expected in zip(got, gradients(layer, visible, b, "dense", dtype, torch.float64), strict=True):
        close(mine, expected, dtype)


IMPLICIT_GEMM = [  # b, channels in and out, kernel, stride, dilation, grid
    (8, 8, 24, 3, 1, 1, (1, 3)),
    (4, 40, 16, 3, 1, 1, (3, 4)),
    (2, 130, 17, 3, 1, 1, (3, 4)),
    (1, 48, 5, 3, 1, 1, (3, 4)),
    (1, 8, 8, 7, 1, 1, (4, 5)),
    (4, 16, 16, 5, 2, 1, (3, 4)),
    (2, 24, 40, 3, 2, 1, (3, 4)),
    (4, 16, 16, 1, 2, 1, (3, 4)),
    (4, 8, 16, 3, 2, 2, (3, 4)),
    (2, 16, 16, 3, 1, 2, (3, 4)),
    (4, 16, 8, (1, 3), 1, 1, (3, 4)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "c", "o", "kernel", "stride", "dilation", "grid"), IMPLICIT_GEMM)
def test_implicit_gemm_and_its_gradients(b, c, o, kernel, stride, dilation, grid, dtype):
    """Channels and cells are no multiples of the tiles, most patches lack neighbours."""
    visible = some_visible(grid, batch=1 if b == 8 else 2, keep=2 if grid == (1, 3) else 3)
    torch.manual_seed(0)
    sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = tuple(dilation * (k - 1) // 2 for k in sides)
    layer = nn.Conv2d(c, o, kernel, stride, padding, dilation, bias=b != 2).to(DEVICE)
    got = gradients(layer, visible, b, "direct", dtype)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    for mine, expected in zip(got, gradients(layer, visible, b, "dense", dtype, torch.float64), strict=True):
        close(mine, expected, dtype, 1e-5 if INTERPRETED else 1e-2)  # a GPU multiplies in TF32


def test_a_weight_is_read_as_it_lies():
    visible, layer = some_visible(keep=3), nn.Conv2d(16, 24, 3, 2, 1).to(DEVICE)
    plain = gradients(layer, visible, 2, "direct", torch.float32)
    last = gradients(layer.to(memory_format=torch.channels_last), visible, 2, "direct", torch.float32)
    for got, expected in zip(last, plain, strict=True):
        assert torch.equal(got, expected)


WITHOUT_TABLES = [  # algorithm, b, kernel, stride, padding
    ("halo", 4, 3, 1, 1),
    ("halo", 2, 3, 2, 1),
    ("im2col", 1, 3, 1, 1),
    ("im2col", 2, 3, 2, 1),
    ("im2col", 2, (3, 2), 2, (1, 0)),
]


@pytest.mark.parametrize(("algorithm", "b", "kernel", "stride", "padding"), WITHOUT_TABLES)
def test_what_reads_windows_needs_no_index_table(algorithm, b, kernel, stride, padding):
    visible, dtype = some_visible(), torch.float32
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 10, kernel, stride, padding).to(DEVICE)
    got = gradients(layer, visible, b, algorithm, dtype, kernels=True)
    assert {key[0] for key in visible._tables} == {"neighbourhood"}
    expected = gradients(layer, visible, b, "dense", dtype, torch.float64)
    for mine, right in zip(got, expected, strict=True):
        close(mine, right, dtype, 1e-5 if INTERPRETED else 1e-2)  # a GPU multiplies matrices in TF32


@pytest.mark.parametrize("groups", [1, 6])
def test_one_run_is_like_another_to_the_bit(groups):
    visible, layer = some_visible(keep=3), nn.Conv2d(6, 6, 5, padding=2, groups=groups).to(DEVICE)
    for first, second in zip(*(gradients(layer, visible, 2, "direct", torch.float32) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def network():
    """Depthwise, grouped, dense and strided convolutions and a pooling, converted: every user of the kernels."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1),
    )  # fmt: skip
    context = EncoderContext(dense=False)
    return convert_layers(layers, PACKED, context)[0].to(DEVICE), context


def run(layers, context, visible, kernels, call=None):
    context.visible, context.kernels = visible, kernels
    x = packed(visible, 4, 2)
    y = (call or layers)(x)
    upstream = normal(*y.shape, seed=1)
    return [y, *torch.autograd.grad(y, [x, *layers.parameters()], upstream)]


def test_layers_take_the_kernels_and_give_the_same(monkeypatch):
    layers, context = network()
    visible, launched = some_visible(), set()
    for name in ("gather_windows", "depthwise_convolution"):
        operator = getattr(gpu, name)
        monkeypatch.setattr(gpu, name, lambda *a, name=name, operator=operator: launched.add(name) or operator(*a))
    plain = run(layers, context, visible, False)
    assert not launched
    kernels = run(layers, context, visible, True)
    assert launched == {"gather_windows", "depthwise_convolution"}
    for got, expected in zip(kernels, plain, strict=True):
        close(got, expected, torch.float32)
    context.kernels = True
    layers[0].cells = 2
    assert "algorithm=direct" in repr(layers[0])


def test_autocast_computes_in_its_dtype():
    layers, context = network()
    context.visible, context.kernels = some_visible(), True
    x = packed(context.visible, 4, 2)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layers[0](x)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.sum(), [x, *layers[0].parameters()])
    assert [g.dtype for g in grads] == [torch.float32] * 3
    assert not torch.equal(grads[1], grads[1].bfloat16().float()), "a depthwise weight is not rounded, nor its gradient"


def test_checkpointed_layers():
    layers, context = network()
    visible = some_visible(keep=3)
    again = run(layers, context, visible, True, lambda x: checkpoint(layers, x, use_reentrant=False))
    for got, expected in zip(again, run(layers, context, visible, True), strict=True):
        assert torch.equal(got, expected)


def test_compiled_whole_they_give_the_same():
    layers, context = network()
    visible = some_visible(keep=3)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    for got, expected in zip(
        run(layers, context, visible, True, compiled), run(layers, context, visible, True), strict=True
    ):
        close(got, expected, torch.float32, 1e-5 if INTERPRETED else 1e-2)  # a GPU multiplies matrices in TF32


def test_the_operators_are_what_torch_asks_of_operators():
    visible = some_visible(keep=2)
    around, y = visible.neighbourhood(1), [3, 1, 1, 1, 1]
    cells, weight, bias = (normal(*shape) for shape in ((visible.count, 2, 2, 4), (4, 1, 3, 3), (4,)))
    windows = normal(visible.count, 4, 4, 4)
    torch.library.opcheck(OPS.gather_windows, (cells, around, [1, 1], [4, 4], 0.0))
    torch.library.opcheck(OPS.depthwise_convolution, (cells, weight, bias, around, y, y))
    torch.library.opcheck(OPS.depthwise_convolution, (cells, weight, None, around, y, y))
    full = normal(6, 4, 3, 3)
    torch.library.opcheck(OPS.implicit_gemm, (cells, full, normal(6), around, y, y))
    torch.library.opcheck(OPS.implicit_gemm, (cells, full, None, around, y, y))
    grad = normal(visible.count, 2, 2, 6)
    torch.library.opcheck(OPS.implicit_gemm_input_gradient, (grad, full, around, y, y))
    torch.library.opcheck(OPS.implicit_gemm_weight_gradient, (grad, cells, around, y, y))
    torch.library.opcheck(OPS.sum_windows, (windows, around, [1, 1], 2))
    torch.library.opcheck(OPS.depthwise_input_gradient, (cells, weight, around, y, y))
    torch.library.opcheck(OPS.depthwise_weight_gradient, (cells, cells, around, y, y))


def test_what_does_not_fit_is_refused():
    visible = some_visible()
    cells, around = normal(visible.count, 2, 2, 4), visible.neighbourhood(1)
    with pytest.raises(ValueError, match="beyond the next patch of 2"):
        OPS.gather_windows(cells, around, [3, 3], [8, 8])
    with pytest.raises(ValueError, match="looks 3 cells beyond patches of 2, the neighbours reach 1 patches"):
        OPS.depthwise_convolution(cells, normal(4, 1, 7, 7), None, around, *[[7, 1, 1, 3, 3]] * 2)
    with pytest.raises(ValueError, match="looks 3 cells beyond patches of 2, the neighbours reach 1 patches"):
        OPS.implicit_gemm(cells, normal(8, 4, 7, 7), None, around, *[[7, 1, 1, 3, 3]] * 2)
    with pytest.raises(ValueError, match="too many for the GPU kernels"):
        tile.rows_of(torch.empty(2**30, 1, device="meta"))


@pytest.mark.parametrize("groups", [1, 4])
def test_no_patch_no_work(groups):
    visible = VisiblePatches(torch.zeros(0, 5, dtype=torch.int64, device=DEVICE), (3, 4))
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=groups).to(DEVICE)
    out = gradients(layer, visible, 2, "direct", torch.float32)
    assert [len(out[0]), len(out[1])] == [0, 0]
    assert not out[2].any()


@cuda
def test_a_cuda_graph_takes_them():
    layers, context = network()
    context.visible, context.kernels = some_visible(), True
    x = packed(context.visible, 4, 2)

    def step():
        return [torch.autograd.grad(layers(x).square().sum(), [x, *layers.parameters()])]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (captured,) = step()
    with torch.no_grad():
        x.copy_(normal(*x.shape, seed=3))
    graph.replay()
    for got, expected in zip(captured, step()[0], strict=True):
        close(got, expected, torch.float32, 1e-2)


@cuda
def test_offsets_beyond_two_to_the_31():
    """More elements than int32 counts: the last patch of a large batch is computed as if it were alone."""
    b, c = 8, 1024
    visible = VisiblePatches(torch.arange(4, device=DEVICE).repeat(8200, 1), (2, 2))
    size = visible.count * b * b * c
    assert size > 2**31
    if torch.cuda.mem_get_info()[0] < 10 * size:
        pytest.skip("takes 22 GB of GPU memory")
    last = normal(4, c, b, b, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    x = last.new_zeros(visible.count, b, b, c).permute(0, 3, 1, 2)
    x[-4:] = last
    layer, alone = depthwise_layer(c, 7, 1, 1).bfloat16(), VisiblePatches(torch.arange(4, device=DEVICE)[None], (2, 2))
    results = [
        convolve(cells, layer.weight, layer.bias, layer_axes(layer), c, around, "direct")[-4:]
        for cells, around in ((x, visible), (last, alone))
    ]
    assert torch.equal(*results)
