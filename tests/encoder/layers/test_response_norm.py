"""Global response normalisation in few passes is timm's, its gradients too."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.convert_network import PACKED, convert_layers
from spark_fast.encoder.layers.response_norm import ResponseNorm, response_norm
from tests.encoder.masks import masks

EPS = 1e-6


def timms(channels, channels_last=True):
    layer = GlobalResponseNorm(channels, EPS, channels_last).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def with_gradients(compute, *tensors):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = compute(*tensors)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    return [out, *(t.grad for t in tensors)]


@settings(max_examples=25)
@given(batch=st.integers(1, 3), cells=st.integers(1, 20), channels=st.integers(1, 9), zeros=st.booleans())
def test_values_and_gradients_are_those_of_timm(batch, cells, channels, zeros):
    layer = timms(channels)
    rows = torch.randn(batch, cells, channels, dtype=torch.float64)
    if zeros:
        rows[0, :, 0] = 0  # a channel that an image does not use
    got = with_gradients(lambda *t: response_norm(*t, EPS), rows, layer.weight, layer.bias)

    def as_timm(rows, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, rows[:, :, None])[:, :, 0]

    for ours, theirs in zip(got, with_gradients(as_timm, rows, layer.weight, layer.bias), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@settings(max_examples=10)
@given(visible=masks(), channels_last=st.booleans())
def test_a_converted_layer_takes_either_layout_and_reduces_over_the_visible_cells_of_each_image(visible, channels_last):
    layer, b = timms(6, channels_last), 2
    converted, _ = convert_layers(layer, PACKED, context := EncoderContext(dense=False))
    assert isinstance(converted, ResponseNorm)
    x = torch.randn(visible.count, 6, b, b, dtype=torch.float64)
    x = x.permute(0, 2, 3, 1) if channels_last else x
    expected = torch.cat(
        [
            layer(torch.cat(list(image), 0 if channels_last else 1)[None])[0]  # one tall picture
            for image in x.unflatten(0, (visible.batch, -1))
        ],
        0 if channels_last else 1,
    )
    context.visible = visible
    got = converted(x)
    assert got.shape == x.shape
    torch.testing.assert_close(torch.cat(list(got), 0 if channels_last else 1), expected)


def test_bf16_cells_and_fp32_weights_give_fp32_as_timm_gives_under_autocast():
    layer = timms(8).float()
    rows = torch.randn(2, 50, 8).bfloat16()
    got = with_gradients(lambda rows: response_norm(rows, layer.weight, layer.bias, EPS), rows)
    with torch.autocast("cpu", torch.bfloat16):
        expected = with_gradients(lambda rows: layer(rows[:, :, None])[:, :, 0], rows)
    assert [t.dtype for t in got] == [torch.float32, torch.bfloat16]
    for ours, timm in zip(got, expected, strict=True):  # timm rounds products to bf16, and then takes sums of them
        torch.testing.assert_close(ours.float(), timm.float(), rtol=0, atol=2**-5 * timm.abs().max().item())
