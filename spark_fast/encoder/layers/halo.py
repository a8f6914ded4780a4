"""Layers that look across the edge of a patch: convolutions and poolings of packed patches.

They take a *halo* of cells from the neighbouring patches first (`spark_fast.encoder.conv.geometry`). Cells of masked
patches and outside the image are zero, as in a submanifold sparse convolution, and minus infinity for a maximum.
"""

from __future__ import annotations

import timm.layers as tl
import torch.nn.functional as F
from torch import Tensor, nn

from spark_fast.encoder.conv.convolve import convolve, gather_windows
from spark_fast.encoder.conv.costs import choose_algorithm
from spark_fast.encoder.conv.geometry import Axis, layer_axes
from spark_fast.encoder.conv.kernels import use_kernels
from spark_fast.encoder.layers.converted import ConvertedLayer, PaddedLayer


class HaloLayer(PaddedLayer):
    """Base of the mixins for convolution and pooling.

    Attributes:
        cells: the b of the patches that the layer was last traced with, None before; for the printed algorithm.
        visible_ratio: the visible share of the patches then.
    """

    cells: int | None = None
    visible_ratio = 1.0

    def checked_axes(self, b: int) -> tuple[Axis, Axis]:
        """The layer's geometry along y and x, checked against patches of b x b cells.

        Raises:
            ValueError: the patch is not a whole number of strides.
        """
        axes = layer_axes(self, self.folded_padding)
        if b % axes[0].stride:
            raise ValueError(
                f"{self.layer_path} has stride {axes[0].stride}, which does not divide the {b} cells of a patch"
            )
        return axes

    def algorithm(self, b: int, visible_ratio: float) -> str:
        """How the layer is computed for patches of b x b cells, a share `visible_ratio` of them visible."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The layer's own, and how it is computed."""
        planned = f", b={self.cells}, algorithm={self.algorithm(self.cells, self.visible_ratio)}" if self.cells else ""
        return super().extra_repr() + planned


class HaloConv(HaloLayer):
    """Mixin: a convolution of packed patches."""

    groups: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    weight: Tensor
    bias: Tensor | None

    def algorithm(self, b: int, visible_ratio: float) -> str:
        """pointwise_gemm, direct, halo, im2col or dense: see `spark_fast.encoder.conv.convolve`."""
        kernels = use_kernels(self.context.kernels, self.weight)
        return choose_algorithm(b, self.checked_axes(b), self.weight, self.groups, visible_ratio, kernels)

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b) -> (V, O, b/stride, b/stride); on a dense map while no patches are visible."""
        visible = self.context.visible
        if visible is None:
            return super().forward(x)
        b = x.shape[2]
        kernels = use_kernels(self.context.kernels, self.weight)
        axes, algorithm = self.checked_axes(b), self.algorithm(b, visible.ratio)
        return convolve(x, self.kernel(), self.bias, axes, self.groups, visible, algorithm, kernels)

    @property
    def is_product(self) -> bool:
        """Whether the layer is a matrix product over the cells, or every stride-th, and nothing else: 1x1, no bias."""
        return (
            self.kernel_size == (1, 1)
            and self.stride[0] == self.stride[1]
            and self.groups == 1
            and self.bias is None
            and not any(self.folded_padding)
        )

    def kernel(self) -> Tensor:
        """The weight (O, C/groups, ky, kx) that the layer convolves with: standardised where the layer does that."""
        if isinstance(self, (tl.StdConv2d, tl.StdConv2dSame)):
            gain, eps = None, self.eps
        elif isinstance(self, (tl.ScaledStdConv2d, tl.ScaledStdConv2dSame)):
            gain, eps = (self.gain * self.scale).view(-1), self.eps
        else:
            return self.weight
        flat = self.weight.reshape(1, len(self.weight), -1)  # a batch norm over "channels" O, as timm computes it
        return F.batch_norm(flat, None, None, weight=gain, training=True, eps=eps).reshape_as(self.weight)


class HaloPool(HaloLayer):
    """Mixin: a max or average pooling of packed patches.

    A maximum is over visible cells. An average counts holes as zeros and divides as the layer does.
    """

    kernel_size: int | tuple[int, int]
    stride: int | tuple[int, int]
    dilation: int | tuple[int, int]
    divisor_override: int | None

    def algorithm(self, b: int, visible_ratio: float) -> str:
        """patch (nothing to exchange), halo or dense."""
        y, x = self.checked_axes(b)
        if max(y.lo, y.hi, x.lo, x.hi) > b or any(self.folded_padding):
            return "dense"
        # an average that leaves padding out divides by another number along the image's border
        uneven = any(a.hi > a.end or (a.lo and not getattr(self, "count_include_pad", True)) for a in (y, x))
        if isinstance(self, nn.AvgPool2d) and uneven:
            return "dense"
        return "halo" if y.exchanged or x.exchanged else "patch"

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b) -> (V, C, b/stride, b/stride); on a dense map while no patches are visible."""
        visible = self.context.visible
        if visible is None:
            return super().forward(x)
        b, c = x.shape[2], x.shape[1]
        largest = isinstance(self, nn.MaxPool2d)
        hole = float("-inf") if largest else 0.0
        algorithm = self.algorithm(b, visible.ratio)
        if algorithm == "dense":
            dense = visible.unpack(x, x.new_full((c,), hole))
            return visible.pack(super().forward(F.pad(dense, self.folded_padding, value=self.fill)))
        if algorithm == "halo":
            x = gather_windows(x, self.checked_axes(b), visible, hole, use_kernels(self.context.kernels, x))
        if largest:
            return F.max_pool2d(x, self.kernel_size, self.stride, 0, self.dilation)
        return F.avg_pool2d(x, self.kernel_size, self.stride, divisor_override=self.divisor_override)


class DenseFallback(ConvertedLayer):
    """Mixin: a layer that looks across patches in a way of its own runs on the dense map, zero in the holes."""

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b) -> (V, C', b', b'); on a dense map while no patches are visible."""
        visible = self.context.visible
        if visible is None:
            return super().forward(x)
        return visible.pack(super().forward(visible.unpack(x)))
