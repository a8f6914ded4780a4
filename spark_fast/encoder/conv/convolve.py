"""Convolutions of packed patches: five algorithms with one result; `costs` has which is cheapest.

    pointwise_gemm  1x1: nothing to exchange, a matrix product over the cells
    halo            gather the window of each patch, its own cells and their halo, and convolve it without padding
    im2col          gather the inputs of each output cell, then a matrix product (few cells per patch: a halo
                    convolution with 1x1 or 2x2 outputs runs at a tenth of the speed of a matrix product)
    dense           scatter to the dense map, convolve there, gather back (halo much larger than the patch)
    direct          read the neighbours' cells where they lie, depthwise or all channels with all (`kernels`, on a GPU)

With the GPU kernels `halo` needs no index table, nor does `im2col` where patches have one output cell. Where a layer
stays inside its patch (2x2, stride 2) the patch is its window: nothing is gathered. Only the packed input is saved for
the backward pass, which gathers again.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spark_fast.autograd import AutogradContext, cast_for_autocast
from spark_fast.encoder.conv import kernels as gpu
from spark_fast.encoder.conv.depthwise_cpu import depthwise_gradients
from spark_fast.encoder.conv.geometry import Axis
from spark_fast.encoder.visible import Places, VisiblePatches, collect_segments, lay_segments


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    axes: tuple[Axis, Axis],
    groups: int,
    visible: VisiblePatches,
    algorithm: str,
    kernels: bool = False,
) -> Tensor:
    """The convolution of the dense map, its holes zero, at the visible cells.

    Args:
        x: (V, C, b, b).
        weight: (O, C/groups, ky, kx), with `bias` (O,).
        axes: the layer's geometry along y and x.
        algorithm: one of those that `costs` gives, or `direct`.
        kernels: `halo` by the GPU kernels, from the table of neighbours alone.

    Returns:
        (V, O, b/stride, b/stride), in the dtype of autocast where that is on.
    """
    if algorithm == "direct" and groups > 1:  # takes each weight as it is, in registers
        (x,) = cast_for_autocast(x)
    else:
        x, weight, *biases = cast_for_autocast(x, weight, *([] if bias is None else [bias]))
        bias = biases[0] if biases else None
    b, (y_axis, x_axis) = x.shape[2], axes
    if algorithm == "pointwise_gemm":
        rows = x[:, :, :: y_axis.stride, :: x_axis.stride].permute(0, 2, 3, 1)  # (V, b', b', C)
        return F.linear(rows, weight.flatten(1), bias).permute(0, 3, 1, 2)
    if algorithm == "direct":
        around = visible.neighbourhood(max(axis.patches(b) for axis in axes))
        cells = x.permute(0, 2, 3, 1)  # (V, b, b, C) -> (V, b', b', C)
        operator = gpu.implicit_gemm if groups == 1 else gpu.depthwise_convolution
        return operator(cells, weight, bias, around, y_axis, x_axis).permute(0, 3, 1, 2)
    tables: tuple[Tensor, Tensor | None]
    if algorithm == "dense":
        # one tensor may not be passed twice to a compiled autograd function
        tables = (visible.segments(b), None if y_axis.stride == 1 else visible.segments(b // y_axis.stride))
    elif _needs_no_table(algorithm, b, axes, kernels):
        tables = (visible.neighbourhood(1), None)
    else:
        places = Places(y_axis.window(b), x_axis.window(b))
        if algorithm == "im2col":
            places = Places(y_axis.taps(b), x_axis.taps(b), (y_axis.kernel, x_axis.kernel))
        tables = (visible.window_table(b, places), visible.cell_table(b, places))
    grid = (visible.batch, *visible.grid)
    out = _Convolve.apply(x, weight, bias, algorithm, tuple(y_axis), tuple(x_axis), groups, grid, *tables)
    if algorithm == "halo":
        return out
    out = out.view(-1, b // y_axis.stride, b // y_axis.stride, len(weight))  # (V*b'*b', O) -> (V, b', b', O)
    return out.permute(0, 3, 1, 2)


def gather(rows: Tensor, table: Tensor, fill: float = 0.0) -> Tensor:
    """(n, C) -> (m, C), row n being `fill`."""
    return torch.cat([rows, rows.new_full((1, rows.shape[1]), fill)]).index_select(0, table)


def gather_sum(rows: Tensor, table: Tensor) -> Tensor:
    """(m, C) -> (n, C), the sum over each row of an (n, K) table; index m adds nothing."""
    return _sum_rows(torch.cat([rows, rows.new_zeros(1, rows.shape[1])]), table)


def _product_before_zeros(a: Tensor, b: Tensor, channels: int) -> Tensor:
    """a @ b, (n, m), as rows of `channels` before a row of zeros: what `_sum_rows` takes, without a copy of it."""
    rows = a.new_empty(a.shape[0] * b.shape[1] // channels + 1, channels)
    rows[-1] = 0
    torch.mm(a, b, out=rows[:-1].view(a.shape[0], -1))
    return rows


def _sum_rows(rows: Tensor, table: Tensor) -> Tensor:
    """As `gather_sum`, of (m + 1, C), row m being zeros."""
    return F.embedding_bag(table, rows, mode="sum")  # a gather and a sum in one pass over memory


def gather_windows(
    x: Tensor, axes: tuple[Axis, Axis], visible: VisiblePatches, fill: float = 0.0, kernels: bool = False
) -> Tensor:
    """(V, C, b, b) -> (V, C, n, m), the window of every patch, `fill` where nothing is visible; with a gradient."""
    (y, x_), (c, b), cells = axes, x.shape[1:3], x.permute(0, 2, 3, 1)
    places = Places(y.window(b), x_.window(b))
    if kernels:
        size = (len(places.ys), len(places.xs))
        return gpu.gather_windows(cells, visible.neighbourhood(1), (y.lo, x_.lo), size, fill).permute(0, 3, 1, 2)
    tables = visible.window_table(b, places), visible.cell_table(b, places)
    rows = _Gather.apply(cells.reshape(-1, c), *tables, fill)
    return rows.view(-1, len(places.ys), len(places.xs), c).permute(0, 3, 1, 2)  # (V*n*m, C) -> (V, C, n, m)


class _Gather(torch.autograd.Function):
    """rows (n, C) -> (m, C) by a table, row n being `fill`; backward by the transposed table."""

    @staticmethod
    def forward(rows: Tensor, table: Tensor, transposed: Tensor, fill: float) -> Tensor:
        return gather(rows, table, fill)

    @staticmethod
    def setup_context(ctx: AutogradContext, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple:
        return gather_sum(grad, ctx.saved_tensors[0]), None, None, None


class _ConvolveContext(AutogradContext, Protocol):
    algorithm: str
    y: tuple[int, ...]
    x: tuple[int, ...]
    groups: int
    grid: tuple[int, int, int]
    has_bias: bool


class _Convolve(torch.autograd.Function):
    """Gather, convolve; backward gathers again.

    Returns the map (V, O, b', b') for halo and its rows (V*b'*b', O) for the other algorithms: an output that is a
    view must not be changed in place, and activations do that.
    """

    @staticmethod
    def forward(
        ctx: _ConvolveContext,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        algorithm: str,
        y: tuple[int, ...],
        x_: tuple[int, ...],
        groups: int,
        grid: tuple[int, int, int],
        table: Tensor,
        other: Tensor | None,
    ) -> Tensor:
        ctx.algorithm, ctx.y, ctx.x = algorithm, y, x_
        ctx.groups, ctx.grid, ctx.has_bias = groups, grid, bias is not None
        ctx.save_for_backward(x, weight, table, other)
        axes = Axis(*y), Axis(*x_)
        inputs = _gather_inputs(x, algorithm, axes, grid, table, other)
        if algorithm == "im2col":
            return F.linear(inputs, _matrix(weight), bias)
        result = F.conv2d(inputs, weight, bias, _strides(axes), 0, _dilations(axes), groups)
        if algorithm == "dense":
            return collect_segments(result, x.shape[2] // axes[0].stride, table if other is None else other)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: _ConvolveContext, grad: Tensor) -> tuple:
        x, weight, table, other = ctx.saved_tensors
        axes, b = (Axis(*ctx.y), Axis(*ctx.x)), x.shape[2]
        wanted = ctx.needs_input_grad[:2]
        inputs = _gather_inputs(x, ctx.algorithm, axes, ctx.grid, table, other)
        grad_bias = None
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3)) if ctx.algorithm == "halo" else grad.view(-1, len(weight)).sum(0)
        grad_inputs: Tensor | None = None
        if ctx.algorithm == "im2col":
            grad_weight = _kernel(grad.t() @ inputs, weight) if wanted[1] else None
            if wanted[0]:
                by, c = _matrix(weight), x.shape[1]
                grad_inputs = grad @ by if other is None else _product_before_zeros(grad, by, c)
        else:
            if ctx.algorithm == "dense":
                grad = lay_segments(grad, len(weight), b // axes[0].stride, ctx.grid, table if other is None else other)
            grad_inputs, grad_weight = _gradients(grad, inputs, weight, axes, ctx.groups, wanted)
        grad_x = (
            None
            if grad_inputs is None
            else _scatter_gradient(grad_inputs, x, ctx.algorithm, axes, ctx.grid, table, other)
        )
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None, None


def _gather_inputs(
    x: Tensor, algorithm: str, axes: tuple[Axis, Axis], grid: tuple[int, int, int], table: Tensor, other: Tensor | None
) -> Tensor:
    """What the convolution reads.

    halo: windows (V, C, n, m), the patches themselves where the layer stays inside them; im2col: the inputs of each
    output cell, (V*b'*b', ky*kx*C); dense: the padded map (B, C, h*b + .., w*b + ..). Without an `other` table, `table`
    holds the neighbours, and the GPU kernels gather.
    """
    y, x_ = axes
    c, b = x.shape[1], x.shape[2]
    cells = x.permute(0, 2, 3, 1)  # (V, b, b, C)
    if algorithm == "dense":
        return F.pad(lay_segments(cells.reshape(-1, b * c), c, b, grid, table), (x_.lo, x_.hi, y.lo, y.hi))
    if algorithm == "halo" and not _exchanged(axes):
        return x
    if other is None:
        size = (len(y.window(b)), len(x_.window(b)))
        rows = gpu.gather_windows(cells, table, (y.lo, x_.lo), size)  # (V, n, m, C)
    else:
        rows = gather(cells.reshape(-1, c), table)  # (V*places, C)
    if algorithm == "im2col":
        return rows.view(-1, y.kernel * x_.kernel * c)
    return rows.view(-1, len(y.window(b)), len(x_.window(b)), c).permute(0, 3, 1, 2)


def _scatter_gradient(
    grad: Tensor,
    x: Tensor,
    algorithm: str,
    axes: tuple[Axis, Axis],
    grid: tuple[int, int, int],
    table: Tensor,
    transposed: Tensor | None,
) -> Tensor:
    """The transpose of `_gather_inputs`: the gradient of what the convolution read -> that of x, (V, C, b, b).

    Of im2col by tables it is (V*b'*b'*ky*kx + 1, C), the last row being zeros.
    """
    (y, x_), (c, b) = axes, x.shape[1:3]
    if algorithm == "dense":
        height, width = grid[1] * b, grid[2] * b
        inner = grad[:, :, y.lo :, x_.lo :]
        # cells that a strided layer never looks at have no gradient
        inner = F.pad(inner, (0, max(0, width - inner.shape[3]), 0, max(0, height - inner.shape[2])))
        rows = collect_segments(inner[:, :, :height, :width], b, table)
    elif not _exchanged(axes) and algorithm == "halo":
        return grad
    else:
        rows = grad.permute(0, 2, 3, 1) if algorithm == "halo" else grad
        if transposed is None:
            windows = rows.view(len(x), len(y.window(b)), len(x_.window(b)), c)
            rows = gpu.sum_windows(windows, table, (y.lo, x_.lo), b)
        elif algorithm == "halo":
            rows = gather_sum(rows.reshape(-1, c), transposed)
        else:
            rows = _sum_rows(rows, transposed)
    return rows.view(-1, b, b, c).permute(0, 3, 1, 2)


def _gradients(
    grad: Tensor, inputs: Tensor, weight: Tensor, axes: tuple[Axis, Axis], groups: int, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Of an unpadded convolution: with respect to what it read, and to its weight."""
    strides, dilations = _strides(axes), _dilations(axes)
    plain = strides == dilations == [1, 1] and groups == weight.shape[0] == inputs.shape[1]
    if plain and grad.device.type == "cpu" and grad.dtype != torch.float64:
        return depthwise_gradients(grad, inputs, weight, wanted)
    grad_inputs, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, inputs, weight, None, strides, [0, 0], dilations, False, [0, 0], groups, [*wanted, False]
    )
    return grad_inputs, grad_weight


def _needs_no_table(algorithm: str, b: int, axes: tuple[Axis, Axis], kernels: bool) -> bool:
    """Is everything that it reads a window, which the kernels gather, or the patch itself?"""
    if algorithm == "im2col":
        return kernels and all(axis.window_is_taps(b) for axis in axes)
    return kernels or not _exchanged(axes)


def _exchanged(axes: tuple[Axis, Axis]) -> bool:
    return any(axis.exchanged for axis in axes)


def _strides(axes: tuple[Axis, Axis]) -> list[int]:
    return [a.stride for a in axes]


def _dilations(axes: tuple[Axis, Axis]) -> list[int]:
    return [a.dilation for a in axes]


def _matrix(weight: Tensor) -> Tensor:
    """(O, C, ky, kx) -> (O, ky*kx*C), in the order of the inputs that im2col gathers."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _kernel(matrix: Tensor, weight: Tensor) -> Tensor:
    """The inverse: (O, ky*kx*C) -> the shape of `weight`."""
    o, c, ky, kx = weight.shape
    return matrix.view(o, ky, kx, c).permute(0, 3, 1, 2)
