"""Layers that mix an image: they reduce over the visible cells of each image, never over one patch.

Squeeze-and-excite, GroupNorm, GRN and their like run unchanged on the visible cells of an image seen as one tall
picture (B, C, L*b, b): in memory that is the packed tensor itself. Averages are thereby averages over visible
cells. Stochastic depth drops whole images, so it sees (B, L, ...).
"""

from __future__ import annotations

from torch import Tensor

from spark_fast.encoder.context import EncoderContext


class GlobalReduction:
    """Mixin: a layer that reduces over the height and width of each image and returns the same shape."""

    context: EncoderContext

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b), or (V, b, b, C) for a channels_last layer; the same shape comes back."""
        seen = self.context.visible
        if seen is None:
            return super().forward(x)  # type: ignore[misc]
        if getattr(self, "channel_dim", 1) == -1:
            return super().forward(x.reshape(seen.batch, -1, *x.shape[2:])).reshape(x.shape)  # type: ignore[misc]
        return seen.as_patches(super().forward(seen.as_images(x)))  # type: ignore[misc]


class ImagePool:
    """Mixin: a pooling of the whole image to one cell, packed or masked."""

    context: EncoderContext

    def forward(self, x: Tensor) -> Tensor:
        """(V, C, b, b) -> (V, C, 1, 1), the same for every patch of an image; (B, C, 1, 1) for maps."""
        return self.context.per_image(x, super().forward)  # type: ignore[misc]


class PerImage:
    """Mixin: a layer that draws one random number per sample (stochastic depth)."""

    context: EncoderContext

    def forward(self, x: Tensor) -> Tensor:
        """(V, ...), patches of one image treated alike."""
        seen = self.context.visible
        if seen is None:
            return super().forward(x)  # type: ignore[misc]
        return super().forward(x.unflatten(0, (seen.batch, seen.per_image))).flatten(0, 1)  # type: ignore[misc]
