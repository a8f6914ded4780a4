"""What the layers of one encoder share during one call."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from spark_fast.encoder.visible import VisiblePatches


class EncoderContext:
    """The visible patches of the running call, or None in a dense call.

    A network is called as `network(x)`, so its layers find the patches in this object. It belongs to one encoder,
    whose `forward` fills and empties it; `recall_for` fills it again during the backward pass.

    Args:
        dense: the layers run on dense maps with holes (the masked encoder), not on packed patches.

    Attributes:
        kernels: whether layers that look across patches and batch norms run by the GPU kernels; None: wherever those
            can run (`spark_fast.encoder.conv.kernels.use_kernels`). Tests and benchmarks force it.
        activated: what a norm has just computed together with the activation behind it, until that is called.
    """

    def __init__(self, dense: bool) -> None:
        self.dense = dense
        self.kernels: bool | None = None
        self.visible: VisiblePatches | None = None
        self.activated: Tensor | None = None
        self._thread: int | None = None  # whose call is running

    def begin(self, visible: VisiblePatches | None) -> None:
        """A call on these patches begins. Raises RuntimeError while another thread's is running."""
        if not torch.compiler.is_compiling():
            me = threading.get_ident()
            if self._thread not in (None, me):
                raise RuntimeError("another thread is using this encoder: give each thread a copy.deepcopy of its own")
            self._thread = me
        self.visible = visible

    def forget(self) -> None:
        """The call is over."""
        self.visible = self.activated = self._thread = None

    def recall_for(self, features: list[Tensor]) -> None:
        """While the gradients of this call's `features`, (B, C, H, W) each, are computed, its patches are here again.

        Gradient checkpointing (`torch.utils.checkpoint`) calls layers once more then. Compiled code holds the patches
        itself.
        """
        visible = self.visible
        if torch.compiler.is_compiling():
            return

        def recall(_: Tensor) -> None:
            if self.visible is None:
                torch.autograd.Variable._execution_engine.queue_callback(self.forget)  # when all is computed
            self.visible = visible

        for each in features:
            if each.requires_grad:
                each.register_hook(recall)

    def image_mean(self, x: Tensor) -> Tensor:
        """The mean over the visible cells of each image, in a shape that broadcasts against `x`.

        (V, C, b, b) -> (V, C, 1, 1), the same for every patch of an image; for maps (B, C, H, W) -> (B, C, 1, 1).
        """
        return self.reduce_images(x, lambda images: images.mean((2, 3), keepdim=True))

    def reduce_images(self, x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """As `image_mean`, for any `reduce` from the cells of images (B, C, h, w) to one per image, (B, C', 1, 1)."""
        visible = self.visible
        if visible is None:
            return reduce(x)
        reduced = reduce(visible.as_images(visible.pack(x) if self.dense else x))
        return reduced if self.dense else visible.spread(reduced)
