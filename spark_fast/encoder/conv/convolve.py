"""Convolutions of packed patches: five ways to the same numbers, and which is cheapest.

    rows     1x1: nothing to exchange, a matrix product over the rows
    window   gather the window of each patch, then the layer without padding (2x2 stride 2: the patch is the window)
    columns  gather the inputs of each output cell, then a matrix product (few cells per patch: a window
             convolution with 1x1 or 2x2 outputs runs at a tenth of the speed of a matrix product)
    canvas   scatter to the dense map, run the layer there, gather back (halo much larger than the patch)
    direct   depthwise, reading the neighbours' cells where they lie (`kernels`, on a GPU)

With the GPU kernels windows need no index table either. What is saved for the backward pass is the packed input
alone: windows, columns and canvases are gathered again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spark_fast.encoder.conv import kernels as gpu
from spark_fast.encoder.conv.depthwise_cpu import depthwise_gradients
from spark_fast.encoder.conv.geometry import Axis
from spark_fast.encoder.visible import Places, VisiblePatches, collect_segments, lay_segments


def costs(b: int, axes: tuple[Axis, Axis], weight: Tensor, groups: int, keep: float) -> dict[str, float]:
    """The time of every way that can convolve patches of b x b cells, in units of the dense layer over all cells.

    Args:
        b: cells per patch side.
        axes: the layer's geometry.
        weight: (O, C/groups, ky, kx).
        groups: of the layer.
        keep: the visible share of the patches.

    The constants were fitted to 495 measured layers (`benchmarks/halo_or_canvas.py`): a window costs by its cells, more
    where its output is small; columns by their cells and by the copies of each cell; the canvas as all cells do.
    """
    y, x = axes
    if groups == 1 and all(a.kernel == 1 and a.lo == 0 for a in axes):
        return {"rows": keep}
    found = {"canvas": 1 + 0.2 / b}
    if max(y.lo, y.hi, x.lo, x.hi) > b:  # tables reach to the next patch, no further
        return found
    window = keep * len(y.window(b)) * len(x.window(b)) / b**2
    if groups > 1:
        return {**found, "window": window / 1.8}
    outputs, copies = (b // y.stride) ** 2, y.kernel * x.kernel / y.stride**2
    columns = keep * ((1 if y.stride == 1 else 0.75) + 4.4 * copies / weight.shape[1])
    if copies <= 1:  # columns are then no larger than a window
        return {**found, "columns": columns}
    return {**found, "window": 0.45 * window * (1 + 8 / outputs), "columns": columns}


def plan(b: int, axes: tuple[Axis, Axis], weight: Tensor, groups: int, keep: float, kernels: bool = False) -> str:
    """The way of least `costs`, direct where the GPU kernels can; static, so that compiled code never changes."""
    if kernels and groups == weight.shape[0] > 1 and weight.shape[1] == 1:
        return "direct"
    estimated = costs(b, axes, weight, groups, keep)
    return min(estimated, key=estimated.__getitem__)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    axes: tuple[Axis, Axis],
    groups: int,
    visible: VisiblePatches,
    way: str,
    kernels: bool = False,
) -> Tensor:
    """(V, C, b, b) -> (V, O, b/stride, b/stride): the convolution of the dense map, its holes zero.

    `kernels`: windows by the GPU kernels, from the table of neighbours alone.
    """
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    b, (y_axis, x_axis) = x.shape[2], axes
    if way == "rows":
        rows = x[:, :, :: y_axis.stride, :: x_axis.stride].permute(0, 2, 3, 1)
        return F.linear(rows, weight.flatten(1), bias).permute(0, 3, 1, 2)
    if way == "direct":
        around = visible.neighbourhood(max(axis.patches(b) for axis in axes))
        return gpu.depthwise_convolution(x.permute(0, 2, 3, 1), weight, bias, around, y_axis, x_axis).permute(
            0, 3, 1, 2
        )
    tables: tuple[Tensor, Tensor | None]
    if way == "canvas":
        # one tensor may not be passed twice to a compiled autograd function
        tables = (visible.segments(b), None if y_axis.stride == 1 else visible.segments(b // y_axis.stride))
    elif way == "window" and kernels:
        tables = (visible.neighbourhood(1), None)
    else:
        shape = (y_axis.window(b), x_axis.window(b))
        if way == "columns":
            shape = (y_axis.columns(b), x_axis.columns(b))
        places = Places(*shape, (y_axis.kernel, x_axis.kernel) if way == "columns" else (1, 1))
        tables = (visible.window_table(b, places), visible.cell_table(b, places))
    grid = (visible.batch, *visible.grid)
    out = _Convolve.apply(x, weight, bias, way, tuple(y_axis), tuple(x_axis), groups, grid, *tables)
    if way == "window":
        return out
    return out.view(-1, b // y_axis.stride, b // y_axis.stride, len(weight)).permute(0, 3, 1, 2)


def gather(rows: Tensor, table: Tensor, fill: float = 0.0) -> Tensor:
    """(n, C) -> (m, C), row n being `fill`."""
    return torch.cat([rows, rows.new_full((1, rows.shape[1]), fill)]).index_select(0, table)


def gather_sum(rows: Tensor, table: Tensor) -> Tensor:
    """(m, C) -> (n, C), the sum over each row of an (n, K) table; index m adds nothing."""
    # embedding_bag is a gather and a sum in one pass over memory
    return F.embedding_bag(table, torch.cat([rows, rows.new_zeros(1, rows.shape[1])]), mode="sum")


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
    return rows.view(-1, len(places.ys), len(places.xs), c).permute(0, 3, 1, 2)


class _Gather(torch.autograd.Function):
    """rows (n, C) -> (m, C) by a table, row n being `fill`; backward by the transposed table."""

    @staticmethod
    def forward(rows: Tensor, table: Tensor, transposed: Tensor, fill: float) -> Tensor:
        return gather(rows, table, fill)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return gather_sum(grad, ctx.saved_tensors[0]), None, None, None


class _Convolve(torch.autograd.Function):
    """Gather, convolve; backward gathers again.

    Returns the map (V, O, b', b') for windows and a matrix of its rows for the other ways: an output that is a view
    must not be changed in place, and activations do that.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        way: str,
        y: tuple[int, ...],
        x_: tuple[int, ...],
        groups: int,
        grid: tuple[int, int, int],
        table: Tensor,
        other: Tensor | None,
    ) -> Tensor:
        axes = Axis(*y), Axis(*x_)
        seen = _spread(x, way, axes, grid, table, other)
        if way == "columns":
            return F.linear(seen, _matrix(weight), bias)
        result = F.conv2d(seen, weight, bias, _strides(axes), 0, _dilations(axes), groups)
        if way == "canvas":
            return collect_segments(result, x.shape[2] // axes[0].stride, table if other is None else other)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, bias, ctx.way, ctx.y, ctx.x, ctx.groups, ctx.grid, table, other = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, table, other)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, weight, table, other = ctx.saved_tensors
        axes, b = (Axis(*ctx.y), Axis(*ctx.x)), x.shape[2]
        wanted = ctx.needs_input_grad[:2]
        seen = _spread(x, ctx.way, axes, ctx.grid, table, other)
        grad_bias = None
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3)) if ctx.way == "window" else grad.view(-1, len(weight)).sum(0)
        grad_seen: Tensor | None
        if ctx.way == "columns":
            grad_weight = _kernel(grad.t() @ seen, weight) if wanted[1] else None
            grad_seen = grad @ _matrix(weight) if wanted[0] else None
        else:
            if ctx.way == "canvas":
                grad = lay_segments(grad, len(weight), b // axes[0].stride, ctx.grid, table if other is None else other)
            grad_seen, grad_weight = _gradients(grad, seen, weight, axes, ctx.groups, wanted)
        grad_x = None if grad_seen is None else _unspread(grad_seen, x, ctx.way, axes, ctx.grid, table, other)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None, None


def _spread(
    x: Tensor, way: str, axes: tuple[Axis, Axis], grid: tuple[int, int, int], table: Tensor, other: Tensor | None
) -> Tensor:
    """What the convolution reads: windows (V, C, n, m), columns (V*out*out, ky*kx*C), or the padded dense map.

    Windows without an `other` table are those of the GPU kernels, `table` the neighbours.
    """
    y, x_ = axes
    c, b = x.shape[1], x.shape[2]
    cells = x.permute(0, 2, 3, 1)
    if way == "canvas":
        return F.pad(lay_segments(cells.reshape(-1, b * c), c, b, grid, table), (x_.lo, x_.hi, y.lo, y.hi))
    if way == "window" and other is None:
        size = (len(y.window(b)), len(x_.window(b)))
        return gpu.gather_windows(cells, table, (y.lo, x_.lo), size).permute(0, 3, 1, 2)
    rows = gather(cells.reshape(-1, c), table)
    if way == "columns":
        return rows.view(-1, y.kernel * x_.kernel * c)
    return rows.view(-1, len(y.window(b)), len(x_.window(b)), c).permute(0, 3, 1, 2)


def _unspread(
    grad: Tensor,
    x: Tensor,
    way: str,
    axes: tuple[Axis, Axis],
    grid: tuple[int, int, int],
    table: Tensor,
    transposed: Tensor | None,
) -> Tensor:
    """The transpose of `_spread`: the gradient of what the convolution read -> that of x."""
    (y, x_), (c, b) = axes, x.shape[1:3]
    if way == "canvas":
        height, width = grid[1] * b, grid[2] * b
        inner = grad[:, :, y.lo :, x_.lo :]
        # cells that a strided layer never looks at have no gradient
        inner = F.pad(inner, (0, max(0, width - inner.shape[3]), 0, max(0, height - inner.shape[2])))
        rows = collect_segments(inner[:, :, :height, :width], b, table)
    elif transposed is None:
        return gpu.sum_windows(grad.permute(0, 2, 3, 1), table, (y.lo, x_.lo), b).permute(0, 3, 1, 2)
    elif way == "window":
        rows = gather_sum(grad.permute(0, 2, 3, 1).reshape(-1, c), transposed)
    else:
        rows = gather_sum(grad.view(-1, c), transposed)
    return rows.view(-1, b, b, c).permute(0, 3, 1, 2)


def _gradients(
    grad: Tensor, seen: Tensor, weight: Tensor, axes: tuple[Axis, Axis], groups: int, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of an unpadded convolution: with respect to what it read, and to its weight."""
    strides, dilations = _strides(axes), _dilations(axes)
    plain = strides == dilations == [1, 1] and groups == weight.shape[0] == seen.shape[1]
    if plain and grad.device.type == "cpu" and grad.dtype != torch.float64:
        return depthwise_gradients(grad, seen, weight, wanted)
    grad_seen, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, seen, weight, None, strides, [0, 0], dilations, False, [0, 0], groups, [*wanted, False]
    )
    return grad_seen, grad_weight


def _strides(axes: tuple[Axis, Axis]) -> list[int]:
    return [a.stride for a in axes]


def _dilations(axes: tuple[Axis, Axis]) -> list[int]:
    return [a.dilation for a in axes]


def _matrix(weight: Tensor) -> Tensor:
    """(O, C, ky, kx) -> (O, ky*kx*C), in the order of the columns."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _kernel(matrix: Tensor, weight: Tensor) -> Tensor:
    """The inverse: (O, ky*kx*C) -> the shape of `weight`."""
    o, c, ky, kx = weight.shape
    return matrix.view(o, ky, kx, c).permute(0, 3, 1, 2)
