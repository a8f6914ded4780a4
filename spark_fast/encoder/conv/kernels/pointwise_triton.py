"""What a ConvNeXt block does between its matrix products: bias and GELU, then bias, layer scale and residual.

    gelu_of_sum      out = gelu(x + bias)
    scaled_residual  out = shortcut + factor * gamma * (x + bias)

`factor` is stochastic depth, a number for each sample; any of bias, gamma and factor may be absent. Arithmetic is fp32,
and the result is rounded once. The biases are those of the matrix products before, which leave them out: so their
gradients, and that of gamma, are sums over rows of what the backward pass has in registers, and no pass of their own.
They are added up in fp32 in two fixed steps, as in `layer_norm_triton`.

With x in bf16, shortcut and output of `scaled_residual` in fp32, N cells of C channels:

    gelu_of_sum      forward 4*N*C bytes    backward 6*N*C    PyTorch 4 and 6, and 2 for the bias
    scaled_residual  forward 10*N*C         backward 8*N*C    PyTorch 18 and 30: a pass for each of cast, product, sum

The gradient of the shortcut is that of the output, the same tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from spark_fast.autograd import AutogradContext
from spark_fast.encoder.conv.kernels.operator import operator, with_gradient
from spark_fast.encoder.conv.kernels.tile import at, channel_tile, column_runs, my_tile, on_device, rows_of

ELEMENTS, WARPS = 2048, 4  # of a tile: 16 for each thread
HALF_ROOT, DENSITY = tl.constexpr(0.7071067811865476), tl.constexpr(0.3989422804014327)  # 1/sqrt(2), 1/sqrt(2*pi)


@triton.jit
def _column(values, c, C: tl.constexpr):
    return tl.load(values + c, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _rows(values, row, c, there, C: tl.constexpr):
    return tl.load(at(values, row, c, C), mask=there, other=0.0).to(tl.float32)


@triton.jit
def _gelu_kernel(x, bias, out, N, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    tile, c = my_tile(C, CHANNELS)
    row = tile * ROWS + tl.arange(0, ROWS)
    there = (row < N)[:, None] & (c < C)[None, :]
    value = _rows(x, row, c, there, C) + _column(bias, c, C)
    tl.store(at(out, row, c, C), 0.5 * value * (1 + tl.erf(value * HALF_ROOT)), mask=there)


@triton.jit
def _gelu_gradient_kernel(
    grad, x, bias, out, partial, N, RUN, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """RUN tiles; what they add to the gradient of the bias."""
    run, c = my_tile(C, CHANNELS)
    total, shift = tl.zeros((ROWS, CHANNELS), tl.float32), _column(bias, c, C)
    for tile in range(RUN):
        row = (run * RUN + tile) * ROWS + tl.arange(0, ROWS)
        there = (row < N)[:, None] & (c < C)[None, :]
        value = _rows(x, row, c, there, C) + shift
        slope = 0.5 * (1 + tl.erf(value * HALF_ROOT)) + value * DENSITY * tl.exp(-0.5 * value * value)
        slope *= _rows(grad, row, c, there, C)
        tl.store(at(out, row, c, C), slope, mask=there)
        total += slope
    tl.store(partial + run * C + c, tl.sum(total, 0), mask=c < C)


@triton.jit
def _residual_kernel(
    x, bias, gamma, factor, shortcut, out, N, PER,
    C: tl.constexpr, BIAS: tl.constexpr, GAMMA: tl.constexpr, FACTOR: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """PER rows have one factor."""
    tile, c = my_tile(C, CHANNELS)
    row = tile * ROWS + tl.arange(0, ROWS)
    there = (row < N)[:, None] & (c < C)[None, :]
    value = _rows(x, row, c, there, C)
    if BIAS:
        value += _column(bias, c, C)
    if GAMMA:
        value *= _column(gamma, c, C)
    if FACTOR:
        value *= tl.load(factor + row // PER, mask=row < N, other=0.0).to(tl.float32)[:, None]
    tl.store(at(out, row, c, C), value + _rows(shortcut, row, c, there, C), mask=there)


@triton.jit
def _residual_gradient_kernel(
    grad, x, bias, gamma, factor, out, partial, N, PER, RUN,
    C: tl.constexpr, BIAS: tl.constexpr, GAMMA: tl.constexpr, FACTOR: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of x over RUN tiles; what they add to those of bias and gamma."""
    run, c = my_tile(C, CHANNELS)
    of_bias = tl.zeros((ROWS, CHANNELS), tl.float32)
    of_gamma = tl.zeros((ROWS, CHANNELS), tl.float32)
    for tile in range(RUN):
        row = (run * RUN + tile) * ROWS + tl.arange(0, ROWS)
        there = (row < N)[:, None] & (c < C)[None, :]
        upstream = _rows(grad, row, c, there, C)
        if FACTOR:
            upstream *= tl.load(factor + row // PER, mask=row < N, other=0.0).to(tl.float32)[:, None]
        if GAMMA:
            value = _rows(x, row, c, there, C)
            if BIAS:
                value += _column(bias, c, C)
            of_gamma += upstream * value
            upstream *= _column(gamma, c, C)
        of_bias += upstream
        tl.store(at(out, row, c, C), upstream, mask=there)
    place = partial + run * (2 * C) + c
    tl.store(place, tl.sum(of_bias, 0), mask=c < C)
    tl.store(place + C, tl.sum(of_gamma, 0), mask=c < C)


@operator("(Tensor x, Tensor bias) -> Tensor")
def gelu_of_sum(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), exact: (..., C) and (C,) -> (..., C) in the dtype of x.

    Raises:
        ValueError: too many rows.
    """
    out = _gelu_like(x, bias)
    rows_of(x)
    _launch(_gelu_kernel, x, None, (x.contiguous(), bias.contiguous(), out, _count(x)))
    return out


@operator("(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)")
def gelu_of_sum_gradients(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `gelu_of_sum`: of x, in its dtype, and of the bias, (C,) fp32."""
    out, (runs, tiles) = x.new_empty(x.shape), _runs(x)
    partial = x.new_empty(runs, x.shape[-1], dtype=torch.float32)
    _launch(
        _gelu_gradient_kernel,
        x,
        runs,
        (grad.contiguous(), x.contiguous(), bias.contiguous(), out, partial, _count(x), tiles),
    )
    return out, partial.sum(0)


@operator("(Tensor x, Tensor? bias, Tensor? gamma, Tensor? factor, Tensor shortcut) -> Tensor")
def scaled_residual(
    x: Tensor, bias: Tensor | None, gamma: Tensor | None, factor: Tensor | None, shortcut: Tensor
) -> Tensor:
    """shortcut + factor * gamma * (x + bias), in the dtype that PyTorch promotes these to.

    Args:
        x: (S, ..., C), of S samples.
        bias, gamma: (C,) or None.
        factor: (S,) or None.
        shortcut: as x.

    Raises:
        ValueError: too many rows.
    """
    out = _residual_like(x, bias, gamma, factor, shortcut)
    rows_of(x)
    pointers = [x if t is None else t.contiguous() for t in (bias, gamma, factor)]  # x where it is not read
    arguments = (x.contiguous(), *pointers, shortcut.contiguous(), out, _count(x), _per_sample(x))
    _launch(_residual_kernel, x, None, arguments, [t is not None for t in (bias, gamma, factor)])
    return out


@operator("(Tensor grad, Tensor x, Tensor? bias, Tensor? gamma, Tensor? factor) -> (Tensor, Tensor)")
def scaled_residual_gradients(
    grad: Tensor, x: Tensor, bias: Tensor | None, gamma: Tensor | None, factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of `scaled_residual`: of x, in its dtype, and of bias and gamma, (2, C) fp32."""
    out, (runs, tiles) = x.new_empty(x.shape), _runs(x)
    partial = x.new_empty(runs, 2, x.shape[-1], dtype=torch.float32)
    pointers = [x if t is None else t.contiguous() for t in (bias, gamma, factor)]
    arguments = (grad.contiguous(), x.contiguous(), *pointers, out, partial, _count(x), _per_sample(x), tiles)
    _launch(_residual_gradient_kernel, x, runs, arguments, [t is not None for t in (bias, gamma, factor)])
    return out, partial.sum(0)


def _count(x: Tensor) -> int:
    return x.shape[:-1].numel()


def _per_sample(x: Tensor) -> int:
    return max(1, x.shape[1:-1].numel())


def _tile(x: Tensor) -> tuple[int, int]:
    wide = channel_tile(x.shape[-1])
    return ELEMENTS // wide, wide


def _runs(x: Tensor) -> tuple[int, int]:
    rows, wide = _tile(x)
    return column_runs(-(-_count(x) // rows), -(-x.shape[-1] // wide))


def _launch(
    kernel: triton.JITFunction, x: Tensor, runs: int | None, arguments: tuple, present: Iterable[bool] = ()
) -> None:
    """Over all tiles of x, or over `runs` of them."""
    (rows, wide), channels = _tile(x), x.shape[-1]
    programs = (-(-_count(x) // rows) if runs is None else runs) * -(-channels // wide)
    if x.numel():
        with on_device(x):
            kernel[(programs,)](*arguments, channels, *present, rows, wide, num_warps=WARPS)


@torch.library.register_fake(gelu_of_sum)
def _gelu_like(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake(gelu_of_sum_gradients)
def _gelu_gradients_like(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1], dtype=torch.float32)


@torch.library.register_fake(scaled_residual)
def _residual_like(
    x: Tensor, bias: Tensor | None, gamma: Tensor | None, factor: Tensor | None, shortcut: Tensor
) -> Tensor:
    dtype = torch.promote_types(x.dtype, shortcut.dtype)
    return x.new_empty(x.shape, dtype=dtype if gamma is None else torch.promote_types(dtype, gamma.dtype))


@torch.library.register_fake(scaled_residual_gradients)
def _residual_gradients_like(
    grad: Tensor, x: Tensor, bias: Tensor | None, gamma: Tensor | None, factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(2, x.shape[-1], dtype=torch.float32)


def _keep_gelu(ctx: AutogradContext, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gelu_backward(ctx: AutogradContext, grad: Tensor) -> tuple:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = gelu_of_sum_gradients(grad, x, bias)
    return grad_x, grad_bias.to(bias.dtype)


class _ResidualContext(AutogradContext, Protocol):
    shortcut: torch.dtype


def _keep_residual(ctx: _ResidualContext, inputs: tuple, output: Tensor) -> None:
    *kept, shortcut = inputs
    ctx.shortcut = shortcut.dtype
    ctx.save_for_backward(*kept)


def _residual_backward(ctx: _ResidualContext, grad: Tensor) -> tuple:
    x, bias, gamma, factor = ctx.saved_tensors
    grad_x, sums = scaled_residual_gradients(grad, x, bias, gamma, factor)
    grads: list[Tensor | None] = [
        sums[i].to(tensor.dtype) if ctx.needs_input_grad[1 + i] else None for i, tensor in enumerate((bias, gamma))
    ]
    return grad_x, *grads, None, grad.to(ctx.shortcut)


gelu_of_sum_with_gradient = with_gradient(gelu_of_sum, _keep_gelu, _gelu_backward)
residual_with_gradient = with_gradient(scaled_residual, _keep_residual, _residual_backward)
