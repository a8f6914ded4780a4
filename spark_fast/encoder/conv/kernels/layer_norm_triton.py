"""LayerNorm over the channels of a cell: the row is read once, its statistics are fp32, the output is rounded once.

    out[n, c] = (x[n, c] - mean[n]) * rstd[n] * weight[c] + bias[c],   rstd[n] = 1 / sqrt(var[n] + eps)

Autocast runs PyTorch's layer norm in fp32: it casts the cells before it, and what follows casts them back. Here both
casts happen in registers. A program holds whole rows, so the variance is a second sum over the same registers, of
squared differences from the mean. Nothing but x is saved: the backward pass reads x anyway, and takes its statistics
again. With e bytes per element of x and of the output, N cells of C channels:

    forward   bytes = 2*e*N*C    by autocast and PyTorch  (6 + 8 + 6)*N*C in bf16
    backward  bytes = 3*e*N*C    by autocast and PyTorch  (6 + 12 + 8 + 6)*N*C

and 16*runs*C of sums for the gradients of weight and bias, which are added up in fp32 in two fixed steps (each program
over a run of rows, then over runs): no atomics, the same bits every time.

Worked example: ConvNeXt-S's stage 1, 224 px, batch 128, mask 0.6 (N = 2560*64, C = 96, bf16): 63 MB forward and 94 MB
backward, 16 and 24 us at 4.0 TB/s, where autocast and PyTorch move 315 and 503 MB.
"""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from spark_fast.autograd import AutogradContext
from spark_fast.encoder.conv.kernels.operator import operator, with_gradient
from spark_fast.encoder.conv.kernels.tile import at, column_runs, on_device, row_block, rows_of


@triton.jit
def _normalized(x, row, c, N, eps, C: tl.constexpr):
    """Rows of x, normalised, in fp32, zero beyond C and N; their 1 / standard deviation; which elements there are."""
    there = (row < N)[:, None] & (c < C)[None, :]
    values = tl.load(at(x, row, c, C), mask=there, other=0.0).to(tl.float32)
    centred = tl.where(there, values - (tl.sum(values, 1) / C)[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * rstd[:, None], rstd, there


@triton.jit
def _normalize_kernel(
    x, weight, bias, out, N, eps,
    C: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows."""
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    value, _, there = _normalized(x, row, c, N, eps, C)
    if WEIGHT:
        value *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        value += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(at(out, row, c, C), value, mask=there)


@triton.jit
def _gradient_kernel(
    grad, x, weight, out, partial, N, eps, RUN,
    C: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of x over RUN tiles of ROWS rows, and their share of those of weight and bias."""
    run, c = tl.program_id(0), tl.arange(0, CHANNELS)
    factor = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :] if WEIGHT else 1.0
    of_weight = tl.zeros((ROWS, CHANNELS), tl.float32)
    of_bias = tl.zeros((ROWS, CHANNELS), tl.float32)
    for tile in range(RUN):
        row = (run * RUN + tile) * ROWS + tl.arange(0, ROWS)
        normal, rstd, there = _normalized(x, row, c, N, eps, C)
        upstream = tl.load(at(grad, row, c, C), mask=there, other=0.0).to(tl.float32)
        of_weight += upstream * normal
        of_bias += upstream
        upstream *= factor
        mean, along = tl.sum(upstream, 1) / C, tl.sum(upstream * normal, 1) / C
        tl.store(at(out, row, c, C), (upstream - mean[:, None] - normal * along[:, None]) * rstd[:, None], mask=there)
    place = partial + run * (2 * C) + c
    tl.store(place, tl.sum(of_weight, 0), mask=c < C)
    tl.store(place + C, tl.sum(of_bias, 0), mask=c < C)


@operator("(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) -> Tensor")
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Normalise each row of (..., C), fp32, bf16 or fp16, over its C channels; the same shape, rounded to `dtype`.

    Args:
        weight, bias: (C,) or None, of any of these dtypes.

    Raises:
        ValueError: too many rows.
    """
    out, channels = _like(x, weight, bias, eps, dtype), x.shape[-1]
    rows_of(x)
    high, wide, warps = row_block(channels)
    count = x.shape[:-1].numel()
    if x.numel():
        with on_device(x):
            _normalize_kernel[(-(-count // high),)](
                x.contiguous(), _or(weight, x), _or(bias, x), out, count, eps,
                channels, weight is not None, bias is not None, high, wide, num_warps=warps,
            )  # fmt: skip
    return out


@operator("(Tensor grad, Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)")
def layer_norm_gradients(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of `layer_norm`: of x, in its dtype, and of weight and bias, (2, C) fp32."""
    out, channels = _gradients_like(grad, x, weight, eps)[0], x.shape[-1]
    high, wide, warps = row_block(channels)
    count = x.shape[:-1].numel()
    runs, tiles = column_runs(-(-count // high), 1)
    partial = x.new_empty(runs, 2, channels, dtype=torch.float32)
    if x.numel():
        with on_device(x):
            _gradient_kernel[(runs,)](
                grad.contiguous(), x.contiguous(), _or(weight, x), out, partial, count, eps, tiles,
                channels, weight is not None, high, wide, num_warps=warps,
            )  # fmt: skip
    return out, partial.sum(0)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for the kernel: of `other`, which it then does not read."""
    return other if tensor is None else tensor.contiguous()


@torch.library.register_fake(layer_norm)
def _like(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake(layer_norm_gradients)
def _gradients_like(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(2, x.shape[-1], dtype=torch.float32)


class _NormContext(AutogradContext, Protocol):
    eps: float
    bias: torch.dtype | None


def _keep(ctx: _NormContext, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.eps, _ = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _gradients(ctx: _NormContext, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    grad_x, sums = layer_norm_gradients(grad, x, weight, ctx.eps)
    grad_weight = sums[0].to(weight.dtype) if ctx.needs_input_grad[1] else None
    grad_bias = sums[1].to(ctx.bias) if ctx.needs_input_grad[2] else None
    return grad_x, grad_weight, grad_bias, None, None


layer_norm_with_gradient = with_gradient(layer_norm, _keep, _gradients)
