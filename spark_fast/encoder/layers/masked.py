"""The published way: dense layers over the whole map, with the holes zeroed and statistics over visible cells.

It computes what the packed encoder computes, at the cost of the whole image: the oracle in tests, the baseline in
benchmarks. A hole is zeroed where its content would be seen, before a layer that looks across patches; what other
layers leave in a hole meanwhile meets only zero gradients.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from spark_fast.encoder.context import EncoderContext


class MaskedLocal:
    """Mixin: a convolution or pooling of dense maps that sees zeros in the holes (nothing, for a maximum)."""

    context: EncoderContext
    folded_padding = (0, 0, 0, 0)  # (left, right, top, bottom) padding taken over from a layer before it
    fill = 0.0  # what that padding holds

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        visible = self.context.visible
        if visible is None or getattr(self, "kernel_size", None) in (1, (1, 1)):
            return super().forward(x)  # type: ignore[misc]
        largest = isinstance(self, nn.MaxPool2d)
        holes = ~visible.cells(x.shape[2])
        x = x.masked_fill(holes, float("-inf") if largest else 0.0)
        if any(self.folded_padding):
            x = F.pad(x, self.folded_padding, value=self.fill)
        out: Tensor = super().forward(x)  # type: ignore[misc]
        # the maximum of nothing must not stay: 0 * inf would reach the weights' gradients
        return out.masked_fill(~visible.cells(out.shape[2]), 0.0) if largest else out


class MaskedNorm:
    """Mixin: a norm whose statistics are those of the visible cells; holes come out zero."""

    context: EncoderContext

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), the same shape comes back."""
        visible = self.context.visible
        if visible is None:
            return super().forward(x)  # type: ignore[misc]
        return visible.unpack(super().forward(visible.pack(x)))  # type: ignore[misc]


class MaskedGlobalReduction:
    """Mixin: a layer that reduces over the visible cells of each image of a dense map."""

    context: EncoderContext

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), or (B, H, W, C) for a channels_last layer; the same shape comes back."""
        visible = self.context.visible
        if visible is None:
            return super().forward(x)  # type: ignore[misc]
        last = getattr(self, "channel_dim", 1) == -1
        images = visible.as_images(visible.pack(x.permute(0, 3, 1, 2) if last else x))
        mixed: Tensor = super().forward(images.permute(0, 2, 3, 1) if last else images)  # type: ignore[misc]
        dense = visible.unpack(visible.as_patches(mixed.permute(0, 3, 1, 2) if last else mixed))
        return dense.permute(0, 2, 3, 1) if last else dense
