"""How far a convolution or pooling looks across the edge of a patch.

Along one axis, a layer of kernel k, stride s and dilation d that pads `lo` cells before the map needs, beside a
patch's own b cells, `lo` cells of what comes before it and `hi` of what comes after:

    reach = d*(k-1) + 1,   hi = reach - s - lo,   window = lo + b + hi   ->   out = b / s cells

Patches stay aligned, and a layer can be packed, only where the layer turns m*s cells into m.
"""

from __future__ import annotations

from typing import NamedTuple

import timm.layers as tl
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import nn

SAME = (tl.Conv2dSame, tl.StdConv2dSame, tl.ScaledStdConv2dSame, MaxPool2dSame, AvgPool2dSame)


class Axis(NamedTuple):
    """The geometry of a layer along one axis, in cells."""

    kernel: int
    stride: int
    dilation: int
    lo: int  # padding before the map
    end: int  # padding after it

    @property
    def reach(self) -> int:
        """Cells from the first tap of the kernel to the last, both counted."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def hi(self) -> int:
        """Cells needed after the patch; negative where the layer does not look at the last ones."""
        return self.reach - self.stride - self.lo

    @property
    def exchanged(self) -> bool:
        """Does the layer look across the edge of a patch?"""
        return self.lo > 0 or self.hi > 0

    def window_is_taps(self, b: int) -> bool:
        """Is the window of a patch of b cells what its only output cell reads, neither more nor less?"""
        return self.stride == b and self.dilation == 1

    def patches(self, b: int) -> int:
        """How many patches of b cells the layer looks beyond its own, on the side where it looks further."""
        return -(-max(self.lo, self.hi, 0) // b)

    def window(self, b: int) -> tuple[int, ...]:
        """The cells that a patch of b cells needs, as coordinates from its first: the n places of its window."""
        return tuple(range(-self.lo, b + self.hi))

    def taps(self, b: int) -> tuple[int, ...]:
        """The cells that each output cell needs, k for one output cell after the other."""
        steps = range(-self.lo, b - self.lo, self.stride)
        return tuple(start + tap * self.dilation for start in steps for tap in range(self.kernel))

    def aligned(self, ceil_mode: bool = False) -> bool:
        """Does the layer turn m*s cells into m?"""
        short = self.lo + self.end - self.reach  # of a first output cell
        rounded = -(-short // self.stride) if ceil_mode else short // self.stride
        return rounded == -1


def layer_axes(layer: nn.Module, folded_padding: tuple[int, int, int, int] = (0, 0, 0, 0)) -> tuple[Axis, Axis]:
    """The geometry of a convolution or pooling along y and x, for maps that are a multiple of its stride.

    Args:
        folded_padding: (left, right, top, bottom) cells of padding taken over from a layer before it.
    """
    kernel, stride, dilation = (_pair(getattr(layer, n, 1)) for n in ("kernel_size", "stride", "dilation"))
    left, right, top, bottom = folded_padding
    both = []
    for i, (before, after) in enumerate(((top, bottom), (left, right))):
        lo, end = _padding(layer, i, kernel[i], stride[i], dilation[i])
        both.append(Axis(kernel[i], stride[i], dilation[i], lo + before, end + after))
    return both[0], both[1]


def _padding(layer: nn.Module, axis: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """(before, after). "Same" padding of a map that is a multiple of the stride does not depend on its size."""
    padding = getattr(layer, "padding", 0)
    if padding == "same" or (isinstance(layer, SAME) and getattr(layer, "same_pad", True)):
        total = max(dilation * (kernel - 1) + 1 - stride, 0)
        return total // 2, total - total // 2
    if padding == "valid":
        return 0, 0
    return (_pair(padding)[axis],) * 2


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
