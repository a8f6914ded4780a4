"""A batch norm and the projection behind it by the GPU kernels, against PyTorch: run by `test_kernels`."""

import copy

import pytest
import torch
from torch import nn

from spark_fast.decoder import Decoder
from spark_fast.encoder.conv import kernels as gpu
from spark_fast.encoder.conv.kernels import projected_norm_triton as kernel
from spark_fast.encoder.layers.batch_norm import projected
from tests.encoder.conv.kernel_cases import DEVICE, DTYPES, close, normal


def layers(c, outputs, seed=0):
    torch.manual_seed(seed)
    norm, project = nn.BatchNorm2d(c, momentum=0.3).to(DEVICE), nn.Conv2d(c, outputs, 1).to(DEVICE)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return norm, project


def rows(n, c, dtype=torch.float32, mean=0.0, seed=0):
    x = (normal(n // 2, c, 2, 1, seed=seed) * 2 + mean).to(dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def compare(n, c, outputs, dtype, mean=0.0):
    """Outputs, running statistics and all gradients beside PyTorch's in float64."""
    (norm, project), x = layers(c, outputs), rows(n, c, dtype, mean)
    exact = copy.deepcopy(nn.Sequential(norm, project)).double()
    wide = x.detach().double().requires_grad_()
    y, expected = projected(norm, project, x, True), exact(wide)
    close(y, expected, dtype, 1e-5 + 1e-7 * abs(mean))
    close(norm.running_mean, exact[0].running_mean, torch.float32)
    close(norm.running_var, exact[0].running_var, torch.float32)
    upstream = normal(*y.shape, dtype=dtype, seed=4)
    got = torch.autograd.grad(y, [x, *norm.parameters(), *project.parameters()], upstream)
    wanted = torch.autograd.grad(expected, [wide, *exact.parameters()], upstream.double())
    for mine, right in zip(got, wanted, strict=True):
        close(mine, right, x.dtype if right.shape == x.shape else torch.float32, 1e-5 + 1e-6 * abs(mean))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("c", "outputs"), [(24, 3), (1, 1), (33, 5), (128, 8)])
def test_it_is_the_norm_and_the_convolution_of_pytorch(c, outputs, dtype):
    compare(150, c, outputs, dtype)


def test_a_mean_far_above_the_deviation_costs_no_digits():
    compare(300, 24, 3, torch.float32, mean=1000.0)


def test_runs_of_many_tiles_the_last_of_which_is_shorter(monkeypatch):
    monkeypatch.setattr(kernel, "PROCESSORS", 1)
    monkeypatch.setattr(kernel, "RESIDENT", 3)
    compare(1800, 24, 3, torch.float32)  # 29 tiles of 64 rows, 10 in a run


def test_what_is_no_number_reaches_all_pixels_and_gradients():
    (norm, project), x = layers(24, 3), rows(64, 24).detach()
    x[3, 1] = float("nan")
    y = projected(norm, project, x.requires_grad_(), True)
    assert y.isnan().all()
    assert torch.autograd.grad(y.sum(), norm.weight)[0][1].isnan()


def test_a_decoder_ends_with_it_and_is_the_decoder_by_pytorch():
    results = []
    for kernels in (True, False):
        torch.manual_seed(0)
        decoder = Decoder(4, 16).to(DEVICE)
        levels = [normal(2, 16, 3, 2).requires_grad_(), normal(2, 8, 6, 4, seed=1).requires_grad_()]
        y = decoder(levels, kernels)
        upstream = normal(*y.shape, seed=2)
        results.append([y, *torch.autograd.grad(y, [*levels, *decoder.parameters()], upstream), *decoder.buffers()])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_compiled_whole_it_gives_the_same():
    results = []
    for compile_ in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        (norm, project), x = layers(6, 3), rows(20, 6)
        y = compile_(lambda x: projected(norm, project, x, True))(x)  # noqa: B023
        grads = torch.autograd.grad(y.square().sum(), [x, *norm.parameters(), *project.parameters()])
        results.append([y, *grads, norm.running_var])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        (lambda norm, project: None, True),
        (lambda norm, project: norm.eval(), False),
        (lambda norm, project: project.register_parameter("bias", None), False),
        (lambda norm, project: setattr(project, "out_channels", gpu.MOST_OUTPUTS + 1), False),
        (lambda norm, project: setattr(project, "in_channels", gpu.MOST_CHANNELS + 1), False),
    ],
)
def test_what_it_does_not_compute_is_left_to_both_layers(change, taken):
    norm, project = layers(24, 3)
    change(norm, project)
    assert (projected(norm, project, rows(20, 24), True) is not None) == taken


def test_the_operators_are_what_torch_asks_of_operators():
    (norm, project), plain, ops = layers(6, 2), rows(12, 6).detach(), torch.ops.spark_fast
    mean, inverse = ops.batch_norm_statistics(plain, None, None, None, 0.0, 1e-5)
    weight, bias, projection, offset = (
        t.detach() for t in (norm.weight, norm.bias, project.weight.flatten(1), project.bias)
    )
    torch.library.opcheck(ops.projected_norm, (plain, mean, inverse, weight, bias, projection, offset))
    grad = normal(6, 2, 2, 1).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(ops.projected_norm_sums, (grad, plain, mean, inverse))
    operands = (grad, plain, mean, inverse, weight, projection, normal(2, 6))
    torch.library.opcheck(ops.projected_norm_input_gradient, operands)
