"""Layers that mix an image: they reduce over the visible cells of each image, never over one patch.

Squeeze-and-excite, GroupNorm, GRN and their like run unchanged on the visible cells of an image seen as one tall
picture (B, C, L*b, b): in memory that is the packed tensor itself. Their averages are then averages over visible
cells. Stochastic depth drops whole images, so it sees (B, L, ...).
"""

from __future__ import annotations

from torch import Tensor

from spark_fast.encoder.layers.converted import ConvertedLayer


class GlobalReduction(ConvertedLayer):
    """Mixin: a layer that reduces over the height and width of each image and returns the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b), or (V, b, b, C) for a channels_last layer; the same shape comes back."""
        visible = self.context.visible
        if visible is None:
            return super().forward(x)
        if getattr(self, "channel_dim", 1) == -1:
            images = x.reshape(visible.batch, -1, *x.shape[2:])  # (V, b, b, C) -> (B, L*b, b, C)
            return super().forward(images).reshape(x.shape)
        return visible.as_patches(super().forward(visible.as_images(x)))


class ImagePool(ConvertedLayer):
    """Mixin: a pooling of the whole image to one cell, packed or masked."""

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b) -> (V, C, 1, 1), the same for every patch of an image; maps (B, C, H, W) -> (B, C, 1, 1)."""
        return self.context.reduce_images(x, super().forward)


class PerImage(ConvertedLayer):
    """Mixin: a layer that draws one random number per sample (stochastic depth)."""

    def forward(self, x: Tensor) -> Tensor:
        """(V, ...), patches of one image treated alike; the same shape comes back."""
        visible = self.context.visible
        if visible is None:
            return super().forward(x)
        images = x.unflatten(0, (visible.batch, visible.num_visible))  # (V, ...) -> (B, L, ...)
        return super().forward(images).flatten(0, 1)
