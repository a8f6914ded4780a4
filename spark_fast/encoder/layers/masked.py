"""Mixins of the masked encoder: dense layers over the whole map, holes zeroed, statistics over visible cells.

This is how the published code computes. The features are those of the packed encoder, at the cost of the whole image:
the oracle in tests, the baseline in benchmarks. A hole is zeroed only before a layer that looks across patches. What
other layers leave in a hole meanwhile meets zero gradients only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark_fast.encoder.layers.converted import ConvertedLayer, PaddedLayer


class MaskedLocal(PaddedLayer):
    """Mixin: a convolution or pooling of dense maps with zeros in the holes (the least number for a maximum)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        visible = self.context.visible
        if visible is None or getattr(self, "kernel_size", None) in (1, (1, 1)):
            return super().forward(x)
        largest = isinstance(self, nn.MaxPool2d)
        holes = ~visible.cells(x.shape[2])
        # not minus infinity: where a window is all of it, Inductor takes the place of the maximum to be in the padding
        x = x.masked_fill(holes, torch.finfo(x.dtype).min if largest else 0.0)
        if any(self.folded_padding):
            x = F.pad(x, self.folded_padding, value=self.fill)
        out: Tensor = super().forward(x)
        # the maximum of nothing must not stay: layers would make infinities of it, and gradients of 0 * inf
        return out.masked_fill(~visible.cells(out.shape[2]), 0.0) if largest else out


class MaskedNorm(ConvertedLayer):
    """Mixin: a norm whose statistics are those of the visible cells; holes come out zero."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), the same shape comes back."""
        visible = self.context.visible
        if visible is None:
            return super().forward(x)
        return visible.unpack(super().forward(visible.pack(x)))


class MaskedGlobalReduction(ConvertedLayer):
    """Mixin: a layer that reduces over the visible cells of each image of a dense map."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), or (B, H, W, C) for a channels_last layer; the same shape comes back."""
        visible = self.context.visible
        if visible is None:
            return super().forward(x)
        last = getattr(self, "channel_dim", 1) == -1
        images = visible.as_images(visible.pack(x.permute(0, 3, 1, 2) if last else x))  # (B, C, L*b, b)
        mixed: Tensor = super().forward(images.permute(0, 2, 3, 1) if last else images)
        dense = visible.unpack(visible.as_patches(mixed.permute(0, 3, 1, 2) if last else mixed))  # (B, C, H, W)
        return dense.permute(0, 2, 3, 1) if last else dense
