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
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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
    images = meta_images(model.encoder, 1, model.input_size)
    whole = _multiply_adds(model.encoder, images)
    visible = torch.arange(model.num_visible, device="meta")[None]
    with model.layer_by_layer():
        features, everything = (_multiply_adds(part, images, visible) for part in (_Encode(model), model))
    return Cost(whole, whole * model.num_visible / (model.grid[0] * model.grid[1]), everything - features, masks)


class _Encode(nn.Module):
    """The encoder alone, called as the model is."""

    def __init__(self, model: Method) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, visible: torch.Tensor) -> list[torch.Tensor]:
        return self.model.encode(images, visible)


def _multiply_adds(module: nn.Module, *inputs: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        run_on_meta(module, *inputs)
    return counter.get_total_flops() / 2
