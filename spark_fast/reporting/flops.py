"""What an image costs: multiply-adds of the encoder on its visible patches, and of what the method adds to it.

Convolutions and matrix products are counted by `torch.utils.flop_counter` on the meta device, where nothing is
computed; norms, activations and the optimiser are not counted. The encoder's count is that of the ordinary network
on a whole image times the visible share, which is exact for every layer that works cell by cell. It is what the task
needs, however it is computed: the same for `--encoder packed` and `masked`, without the extra work of halos or of dense
fallbacks, with each layer of the decoder by itself and its projections of whole maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spark_fast.encoder import VisiblePatches
from spark_fast.encoder.pyramid import meta_images, run_on_meta
from spark_fast.method import Method


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of the forward pass of one mask of one image."""

    whole: float  # the encoder, on an image with nothing masked
    encoder: float  # the encoder, on the visible patches
    decoder: float  # what the method adds
    masks: int = 1  # of each image

    @property
    def flop_per_image(self) -> float:
        """Floating-point operations of a training step: two a multiply-add, and backward twice those of forward."""
        return 2 * 3 * (self.encoder + self.decoder) * self.masks


def count(model: Method, masks: int = 1) -> Cost:
    """The cost of an image with so many masks; the model is not changed."""
    encoder, (h, w) = model.encoder, model.grid
    images = meta_images(encoder, 1, model.input_size, model.in_chans)
    whole = _multiply_adds(encoder, images)
    features = [
        torch.empty(model.num_visible, channels, b, b, dtype=images.dtype, device="meta")
        for channels, b in zip(encoder.channels, (model.patch // stride for stride in encoder.strides), strict=True)
    ]
    visible = VisiblePatches(torch.arange(model.num_visible, device="meta")[None], model.grid)
    with model.layer_by_layer():
        decoder = _multiply_adds(_Decode(model), features, visible, visible.complement())
    return Cost(whole, whole * model.num_visible / (h * w), decoder, masks)


class _Decode(nn.Module):
    """What the method adds, called as a module is."""

    def __init__(self, model: Method) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: list[Tensor], visible: VisiblePatches, on: VisiblePatches) -> Tensor:
        return self.model.decode(features, visible, on)


def _multiply_adds(module: nn.Module, *inputs: object) -> float:
    with FlopCounterMode(display=False) as counter:
        run_on_meta(module, *inputs)
    return counter.get_total_flops() / 2
