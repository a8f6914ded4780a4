"""Global response normalisation (Woo et al., "ConvNeXt V2", CVPR 2023, section 4) over the visible cells of an image.

    out[i, n, c] = x[i, n, c] * (1 + weight[c] * r[i, c]) + bias[c],   r[i, c] = g[i, c] / (mean over c of g[i] + eps),

g being the Euclidean norm over the cells n of image i. Two passes forward: sums of squares, then a product and a sum
with factors of (images, C). Two backward: all sums over the cells in one, then the gradient of x, which is again each
of grad and x times factors of (images, C). Nothing but x is saved.

For N cells of C channels, x in bf16: 6*N*C bytes forward, 10*N*C backward. PyTorch under autocast casts x for the norm
and computes product, sum and residual in fp32: some 140 in all. Sums are fp32, added up in two fixed steps: the same
bits every time.
"""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from spark_fast.autograd import AutogradContext
from spark_fast.encoder.conv.kernels.operator import operator, with_gradient
from spark_fast.encoder.conv.kernels.tile import (
    at,
    channel_tile,
    column_runs,
    my_tile,
    on_device,
    row_block,
    rows_of,
)

ELEMENTS, WARPS = 2048, 4  # of a tile: 16 for each thread


@triton.jit
def _sums_kernel(
    x, grad, partial, PER, RUNS, RUN,
    C: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Over one of the RUNS runs of RUN tiles of an image's PER rows: x*x, and if BACKWARD grad*x and grad."""
    run, c = my_tile(C, CHANNELS)
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    products, grads = squares, squares
    for tile in range(RUN):
        row = (run % RUNS * RUN + tile) * ROWS + tl.arange(0, ROWS)
        there = (row < PER)[:, None] & (c < C)[None, :]
        row += run // RUNS * PER
        value = tl.load(at(x, row, c, C), mask=there, other=0.0).to(tl.float32)
        squares += value * value
        if BACKWARD:
            upstream = tl.load(at(grad, row, c, C), mask=there, other=0.0).to(tl.float32)
            products += upstream * value
            grads += upstream
    place = partial + run * ((3 if BACKWARD else 1) * C) + c
    tl.store(place, tl.sum(squares, 0), mask=c < C)
    if BACKWARD:
        tl.store(place + C, tl.sum(products, 0), mask=c < C)
        tl.store(place + 2 * C, tl.sum(grads, 0), mask=c < C)


@triton.jit
def _scale_kernel(
    x, other, out, scale, shift, N, PER,
    C: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """x * scale of its image + shift of its channel, or if BACKWARD + other * shift of its image."""
    tile, c = my_tile(C, CHANNELS)
    row = tile * ROWS + tl.arange(0, ROWS)
    there = (row < N)[:, None] & (c < C)[None, :]
    value = tl.load(at(x, row, c, C), mask=there, other=0.0).to(tl.float32)
    value *= tl.load(at(scale, row // PER, c, C), mask=there, other=0.0)
    if BACKWARD:
        second = tl.load(at(other, row, c, C), mask=there, other=0.0).to(tl.float32)
        value += second * tl.load(at(shift, row // PER, c, C), mask=there, other=0.0)
    else:
        value += tl.load(shift + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(at(out, row, c, C), value, mask=there)


@triton.jit
def _factors_kernel(
    sums, weight, scale, shift, of_weight, eps, C: tl.constexpr, BACKWARD: tl.constexpr, CHANNELS: tl.constexpr
):
    """What `_scale_kernel` takes, of one image: scale, and if BACKWARD shift and its part of the weight's gradient."""
    image, c = tl.program_id(0), tl.arange(0, CHANNELS)
    first = sums + image * ((3 if BACKWARD else 1) * C) + c
    norm = tl.sqrt(tl.load(first, mask=c < C, other=0.0))
    mean = tl.sum(norm, 0) / C + eps
    response, factor = norm / mean, tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(scale + image * C + c, 1 + factor * response, mask=c < C)
    if BACKWARD:
        products = tl.load(first + C, mask=c < C, other=0.0)
        tl.store(of_weight + image * C + c, response * products, mask=c < C)
        upstream = factor * products
        of_norm = upstream / mean - tl.sum(upstream * norm, 0) / C / (mean * mean)
        of_norm = tl.where(norm > 0, of_norm / tl.where(norm > 0, norm, 1.0), 0.0)
        tl.store(shift + image * C + c, of_norm, mask=c < C)


@operator("(Tensor x, Tensor weight, Tensor bias, float eps, SymInt images) -> Tensor")
def response_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, images: int) -> Tensor:
    """As timm's GlobalResponseNorm, each image by itself.

    Args:
        x: (..., C), image by image, all of the same number of cells.
        weight, bias: (C,).

    Returns:
        the shape and dtype of x.

    Raises:
        ValueError: too many rows.
    """
    rows_of(x)
    x, out = x.contiguous(), _like(x, weight, bias, eps, images)
    scale, _, _ = _factors(_sums(x, None, images), weight, eps)
    _scale(x, None, out, scale, bias.contiguous(), images)
    return out


@operator("(Tensor grad, Tensor x, Tensor weight, float eps, SymInt images) -> (Tensor, Tensor, Tensor)")
def response_norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, images: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `response_norm`: of x, in its dtype, and of weight and bias, (C,) fp32."""
    grad, x = grad.contiguous(), x.contiguous()
    out = _gradients_like(grad, x, weight, eps, images)[0]
    sums = _sums(x, grad, images)
    scale, shift, of_weight = _factors(sums, weight, eps)
    _scale(grad, x, out, scale, shift, images)
    return out, of_weight.sum(0), sums[:, 2].sum(0)


def _factors(sums: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(images, C) each: of x forward, or of grad and of x, and parts of the weight's gradient."""
    images, kinds, channels = sums.shape
    scale, shift, of_weight = sums.new_empty(3, images, channels)
    _, wide, warps = row_block(channels)
    if sums.numel():
        with on_device(sums):
            _factors_kernel[(images,)](
                sums, weight.contiguous(), scale, shift, of_weight, eps, channels, kinds == 3, wide, num_warps=warps
            )
    return scale, shift, of_weight


def _sums(x: Tensor, grad: Tensor | None, images: int) -> Tensor:
    """(images, 1, C) of squares, with `grad` (images, 3, C): of grad*x and grad too."""
    channels, kinds = x.shape[-1], 1 if grad is None else 3
    rows, wide = _tile(channels)
    per = x.shape[:-1].numel() // max(1, images)
    tiles = -(-channels // wide)
    runs, run = column_runs(-(-per // rows), tiles * max(1, images))
    partial = x.new_empty(images, runs, kinds, channels, dtype=torch.float32)
    if x.numel():
        with on_device(x):
            _sums_kernel[(images * runs * tiles,)](
                x, x if grad is None else grad, partial, per, runs, run, channels, grad is not None, rows, wide,
                num_warps=WARPS,
            )  # fmt: skip
    return partial.sum(1)


def _scale(x: Tensor, other: Tensor | None, out: Tensor, scale: Tensor, shift: Tensor, images: int) -> None:
    channels, count = x.shape[-1], x.shape[:-1].numel()
    rows, wide = _tile(channels)
    if x.numel():
        with on_device(x):
            _scale_kernel[(-(-count // rows) * -(-channels // wide),)](
                x, x if other is None else other, out, scale, shift, count, count // images, channels,
                other is not None, rows, wide, num_warps=WARPS,
            )  # fmt: skip


def _tile(channels: int) -> tuple[int, int]:
    wide = channel_tile(channels)
    return ELEMENTS // wide, wide


@torch.library.register_fake(response_norm)
def _like(x: Tensor, weight: Tensor, bias: Tensor, eps: float, images: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake(response_norm_gradients)
def _gradients_like(grad: Tensor, x: Tensor, weight: Tensor, eps: float, images: int) -> tuple[Tensor, Tensor, Tensor]:
    channel = x.new_empty(x.shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape), channel, torch.empty_like(channel)


class _ResponseContext(AutogradContext, Protocol):
    eps: float
    images: int
    bias: torch.dtype


def _keep(ctx: _ResponseContext, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.eps, ctx.images = inputs
    ctx.bias = bias.dtype
    ctx.save_for_backward(x, weight)


def _gradients(ctx: _ResponseContext, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = response_norm_gradients(grad, x, weight, ctx.eps, ctx.images)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(ctx.bias), None, None


response_norm_with_gradient = with_gradient(response_norm, _keep, _gradients)
