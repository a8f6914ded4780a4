"""Layers that look across the edge of a patch: convolutions and poolings of packed patches.

A k x k layer of stride s needs, beside a patch's own b cells per axis, a *halo* of cells from its neighbours:

    lo = padding,  hi = dilation*(k-1) + 1 - stride - padding,  window = lo + b + hi  ->  out = b / stride

Cells of masked patches and outside the image are zero, exactly as in a submanifold sparse convolution. There are
four ways to compute the same numbers; `plan` names the cheapest from static shapes alone:

    rows     1x1: nothing to exchange, a matrix product over the rows
    window   gather the (lo+b+hi)^2 window of each patch, then the layer without padding
    columns  gather the k*k inputs of each output cell, then a matrix product (few cells per patch: a window
             convolution with 1x1 or 2x2 outputs runs at a tenth of the speed of a matrix product)
    canvas   scatter to the dense map, run the layer there, gather back (halo much larger than the patch; layers
             that treat the image edge in their own way)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spark_fast.encoder.depthwise import depthwise
from spark_fast.encoder.visible import Visible


class Current:
    """What the layers of one encoder share during one call: its visible patches, or None in a dense call.

    A network out of timm is called as `network(x)`, so the patches reach its layers by this object, which
    belongs to one encoder and is filled and emptied by that encoder's `forward`.
    """

    def __init__(self) -> None:
        self.visible: Visible | None = None


class _Gather(torch.autograd.Function):
    """rows (n, C) -> (m, C), with a zero row for index n. Backward: gather-and-sum by the transposed table."""

    @staticmethod
    def forward(rows: Tensor, table: Tensor, transposed: Tensor, fill: float) -> Tensor:
        return torch.cat([rows, rows.new_full((1, rows.shape[1]), fill)]).index_select(0, table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (transposed,) = ctx.saved_tensors
        grad = torch.cat([grad, grad.new_zeros(1, grad.shape[1])])
        # embedding_bag is a gather and a sum in one pass over memory
        return F.embedding_bag(transposed, grad, mode="sum"), None, None, None


def gather(x: Tensor, visible: Visible, coords: tuple[int, ...], k: int = 1, fill: float = 0.0) -> Tensor:
    """(V, C, b, b) -> (V*n*n, C): each patch's cells at `coords` x `coords`, `fill` where there is no cell.

    The places are ordered as in `Visible.window_table`.
    """
    c, b = x.shape[1], x.shape[2]
    rows = x.permute(0, 2, 3, 1).reshape(-1, c)  # (V*b*b, C)
    tables = visible.window_table(b, coords, k), visible.cell_table(b, coords, k)
    return _Gather.apply(rows, *tables, fill)


def gather_window(x: Tensor, visible: Visible, lo: int, hi: int, fill: float = 0.0) -> Tensor:
    """(V, C, b, b) -> (V, C, lo+b+hi, lo+b+hi), channels_last."""
    n = lo + x.shape[2] + hi
    window = gather(x, visible, tuple(range(-lo, x.shape[2] + hi)), fill=fill)
    return window.view(-1, n, n, x.shape[1]).permute(0, 3, 1, 2)


class Halo:
    """Mixin: a convolution or pooling of patches. See `spark_fast.encoder.pack` for how a layer becomes one."""

    current: Current
    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any

    def geometry(self, b: int) -> tuple[int, int, int, int, int]:
        """(k, stride, dilation, lo, hi) along both axes, for patches of b x b cells.

        Raises:
            ValueError: the patch is not a whole number of strides, or the layer does not keep patches aligned.
        """
        k, s, p = _square(self.kernel_size), _square(self.stride), _square(self.padding)
        d = _square(getattr(self, "dilation", 1))
        hi = d * (k - 1) + 1 - s - p
        if b % s:
            raise ValueError(f"stride {s} does not divide the {b} cells of a patch in {self}")
        return k, s, d, p, hi


class HaloConv(Halo):
    """A convolution of packed patches."""

    groups: int
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b) -> (V, O, b/stride, b/stride); a dense map when no patches are current."""
        visible = self.current.visible
        if visible is None:
            return super().forward(x)  # type: ignore[misc]
        b = x.shape[2]
        k, s, d, lo, hi = self.geometry(b)
        way = plan(b, k, s, lo, hi, self.groups, visible.per_image / (visible.grid[0] * visible.grid[1]))
        if way == "rows":
            out = F.linear(x[:, :, ::s, ::s].permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
            return out.permute(0, 3, 1, 2)
        if way == "canvas":
            return visible.pack(self._convolve(visible.unpack(x), lo))
        if way == "window":
            return self._convolve(gather_window(x, visible, lo, hi), 0)
        taps = tuple(o * s - lo + t * d for o in range(b // s) for t in range(k))
        columns = gather(x, visible, taps, k).view(-1, b // s, b // s, k * k * x.shape[1])
        return F.linear(columns, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)

    def _convolve(self, x: Tensor, padding: int) -> Tensor:
        """The layer's own convolution, with another padding."""
        s, d = _square(self.stride), _square(self.dilation)
        if self.groups == self.weight.shape[0] == x.shape[1] and d == 1:
            return depthwise(x, self.weight, self.bias, s, padding)
        return F.conv2d(x, self.weight, self.bias, s, padding, d, self.groups)


class HaloPool(Halo):
    """A max or average pooling of packed patches: the maximum over visible cells; zeros count in an average."""

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b) -> (V, C, b/stride, b/stride); a dense map when no patches are current."""
        visible = self.current.visible
        if visible is None:
            return super().forward(x)  # type: ignore[misc]
        b = x.shape[2]
        k, s, d, lo, hi = self.geometry(b)
        largest = isinstance(self, nn.MaxPool2d)
        if (lo or hi > 0) and max(lo, hi) <= b:
            x = gather_window(x, visible, lo, hi, float("-inf") if largest else 0.0)
        if largest:
            return F.max_pool2d(x, k, s, 0, d)
        return F.avg_pool2d(x, k, s)


class Canvas:
    """Mixin: a layer that looks across patches in a way of its own runs on the dense map, zero in the holes."""

    current: Current

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b) -> (V, C', b', b'); a dense map when no patches are current."""
        visible = self.current.visible
        if visible is None:
            return super().forward(x)  # type: ignore[misc]
        return visible.pack(super().forward(visible.unpack(x)))  # type: ignore[misc]


def plan(b: int, k: int, stride: int, lo: int, hi: int, groups: int, keep: float) -> str:
    """The cheapest way to convolve patches of b x b cells; static, so that compiled code never changes."""
    if k == 1 and lo == 0 and groups == 1:
        return "rows"
    if max(lo, hi) > b:
        return "canvas"
    if groups == 1 and b // stride <= 4:
        return "columns"
    window = keep * (lo + b + hi) ** 2 / b**2  # cells computed on, against the dense map's 1
    return "window" if window < 1.8 else "canvas"


def _square(value: Any) -> int:
    """The one side of a square kernel, stride or padding."""
    sides = (value,) if isinstance(value, int) else tuple(value)
    if len(set(sides)) != 1 or not isinstance(sides[0], int):
        raise ValueError(f"only square kernels, strides and paddings can be packed, got {value}")
    return sides[0]
