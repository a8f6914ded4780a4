"""What the layers of one encoder share during one call."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from spark_fast.encoder.visible import VisiblePatches


class EncoderContext:
    """The visible patches of the running call, or None in a dense call.

    A network out of timm is called as `network(x)`, so the patches reach its layers by this object, which
    belongs to one encoder and is filled and emptied by that encoder's `forward`.

    Args:
        dense: the layers run on dense maps with holes (the masked encoder), not on packed patches.

    Attributes:
        kernels: whether layers that look across patches run by the GPU kernels; None: wherever those can run
            (`spark_fast.encoder.conv.kernels.use_kernels`). Tests and benchmarks force it.
    """

    def __init__(self, dense: bool) -> None:
        self.dense = dense
        self.kernels: bool | None = None
        self.visible: VisiblePatches | None = None

    def image_mean(self, x: Tensor) -> Tensor:
        """The mean over the visible cells of each image, in a shape that broadcasts against `x`.

        (V, C, b, b) -> (V, C, 1, 1), the same for every patch of an image; for maps (B, C, H, W) -> (B, C, 1, 1).
        """
        return self.per_image(x, lambda images: images.mean((2, 3), keepdim=True))

    def per_image(self, x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """As `image_mean` for any `reduce`: (B, C, h, w) -> (B, C', 1, 1)."""
        seen = self.visible
        if seen is None:
            return reduce(x)
        reduced = reduce(seen.as_images(seen.pack(x) if self.dense else x))
        return reduced if self.dense else seen.spread(reduced)
