"""Layers that look across the edge of a patch: convolutions and poolings of packed patches.

They take a *halo* of cells from the neighbouring patches first (`geometry`), where cells of masked patches and
outside the image are zero, exactly as in a submanifold sparse convolution, and nothing at all to a maximum.
"""

from __future__ import annotations

from typing import Any

import timm.layers as tl
import torch.nn.functional as F
from torch import Tensor, nn

from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.conv.convolve import convolve, gather_windows, plan
from spark_fast.encoder.conv.geometry import Axis, axes
from spark_fast.encoder.conv.kernels import use_kernels


class Halo:
    """Mixin: a layer of packed patches. See `spark_fast.encoder.convert_network` for how a layer becomes one.

    Attributes:
        where: the layer's path in its network.
        cells: the b of the patches it was last traced with, None before; for the printed plan.
        folded_padding: (left, right, top, bottom) padding taken over from a padding layer before it.
        fill: what that padding holds.
    """

    context: EncoderContext
    where = ""
    cells: int | None = None
    keep = 1.0
    folded_padding = (0, 0, 0, 0)
    fill = 0.0

    def axes(self, b: int) -> tuple[Axis, Axis]:
        """The layer's geometry, checked against patches of b x b cells.

        Raises:
            ValueError: the patch is not a whole number of strides.
        """
        both = axes(self, self.folded_padding)  # type: ignore[arg-type]
        if b % both[0].stride:
            raise ValueError(
                f"{self.where} has stride {both[0].stride}, which does not divide the {b} cells of a patch"
            )
        return both

    def way(self, b: int, keep: float) -> str:
        """How the layer is computed for patches of b x b cells, a share `keep` of them visible."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The layer's own, and how it is computed."""
        planned = f", b={self.cells}, way={self.way(self.cells, self.keep)}" if self.cells else ""
        return super().extra_repr() + planned  # type: ignore[misc]


class HaloConv(Halo):
    """A convolution of packed patches."""

    groups: int
    weight: Tensor
    bias: Tensor | None

    def way(self, b: int, keep: float) -> str:
        """rows, direct, window, columns or canvas: see `spark_fast.encoder.conv.convolve`."""
        return plan(b, self.axes(b), self.weight, self.groups, keep, use_kernels(self.context.kernels, self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b) -> (V, O, b/stride, b/stride); a dense map when no patches are current."""
        seen = self.context.visible
        if seen is None:
            return super().forward(x)  # type: ignore[misc]
        b = x.shape[2]
        kernels = use_kernels(self.context.kernels, self.weight)
        way = plan(b, self.axes(b), self.weight, self.groups, seen.keep, kernels)
        return convolve(x, self.kernel(), self.bias, self.axes(b), self.groups, seen, way, kernels)

    def kernel(self) -> Tensor:
        """The weight (O, C/groups, ky, kx) that the layer convolves with: standardised where the layer does that."""
        layer: Any = self
        if isinstance(layer, (tl.StdConv2d, tl.StdConv2dSame)):
            gain = None
        elif isinstance(layer, (tl.ScaledStdConv2d, tl.ScaledStdConv2dSame)):
            gain = (layer.gain * layer.scale).view(-1)
        else:
            return self.weight
        flat = self.weight.reshape(1, len(self.weight), -1)  # a batch norm over "channels" O, as timm computes it
        return F.batch_norm(flat, None, None, weight=gain, training=True, eps=layer.eps).reshape_as(self.weight)


class HaloPool(Halo):
    """A max or average pooling of packed patches: the maximum over visible cells; an average divides as ever."""

    def way(self, b: int, keep: float) -> str:
        """patch (nothing to exchange), window or canvas."""
        y, x = self.axes(b)
        if max(y.lo, y.hi, x.lo, x.hi) > b or any(self.folded_padding):
            return "canvas"
        # an average that leaves padding out divides by another number along the image's border
        uneven = any(a.hi > a.end or (a.lo and not getattr(self, "count_include_pad", True)) for a in (y, x))
        if isinstance(self, nn.AvgPool2d) and uneven:
            return "canvas"
        return "window" if any(a.lo or a.hi > 0 for a in (y, x)) else "patch"

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b) -> (V, C, b/stride, b/stride); a dense map when no patches are current."""
        seen = self.context.visible
        if seen is None:
            return super().forward(x)  # type: ignore[misc]
        b, c = x.shape[2], x.shape[1]
        largest = isinstance(self, nn.MaxPool2d)
        hole = float("-inf") if largest else 0.0
        way, (y_axis, x_axis) = self.way(b, seen.keep), self.axes(b)
        if way == "canvas":
            dense = seen.unpack(x, x.new_full((c,), hole))
            return seen.pack(super().forward(F.pad(dense, self.folded_padding, value=self.fill)))  # type: ignore[misc]
        if way == "window":
            x = gather_windows(x, (y_axis, x_axis), seen, hole, use_kernels(self.context.kernels, x))
        pool: Any = self
        if largest:
            return F.max_pool2d(x, pool.kernel_size, pool.stride, 0, pool.dilation)
        return F.avg_pool2d(x, pool.kernel_size, pool.stride, divisor_override=pool.divisor_override)


class DenseFallback:
    """Mixin: a layer that looks across patches in a way of its own runs on the dense map, zero in the holes."""

    context: EncoderContext

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b) -> (V, C', b', b'); a dense map when no patches are current."""
        seen = self.context.visible
        if seen is None:
            return super().forward(x)  # type: ignore[misc]
        return seen.pack(super().forward(seen.unpack(x)))  # type: ignore[misc]


class FoldedPadding:
    """Mixin: a padding layer whose padding the layer after it has taken over."""

    context: EncoderContext

    def forward(self, x: Tensor) -> Tensor:
        """Nothing while patches are context: a patch has no border to pad."""
        return super().forward(x) if self.context.visible is None else x  # type: ignore[misc]
