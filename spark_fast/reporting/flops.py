"""What an image costs: multiply-adds of the encoder on its visible patches, and of the decoder on all of it.

Convolutions and matrix products are counted by `torch.utils.flop_counter` on the meta device, where nothing is
computed; norms, activations and the optimiser are not counted. The encoder's count is that of the ordinary network
on a whole image times the visible share, which is exact for every layer that works cell by cell. It is what the task
needs, however it is computed: the same for `--encoder packed` and `masked`, without the extra work of halos or of dense
fallbacks, with each layer of the decoder by itself and its projections of whole maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spark_fast.decoder import UNetBlock
from spark_fast.encoder.pyramid import meta_images, run_on_meta
from spark_fast.spark import SparK


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one image's forward pass."""

    whole: float  # the encoder, on an image with nothing masked
    encoder: float  # the encoder, on the visible patches
    decoder: float  # the projections of the encoder's levels and the decoder

    @property
    def flop_per_image(self) -> float:
        """Floating-point operations of a training step: two a multiply-add, and backward twice those of forward."""
        return 2 * 3 * (self.encoder + self.decoder)


def count(model: SparK) -> Cost:
    """The cost of one image; the model is not changed."""
    encoder, (height, width) = model.encoder, model.input_size
    images = meta_images(encoder, 1, model.input_size)
    whole = _multiply_adds([(encoder, images)])
    maps = [
        torch.empty(1, channels, height // stride, width // stride, dtype=images.dtype, device="meta")
        for channels, stride in zip(encoder.channels, encoder.strides, strict=True)
    ]
    projections = list(zip(model.densify_projs, reversed(maps), strict=True))
    levels = [run_on_meta(project, features) for project, features in projections]
    with _layer_by_layer(model.decoder):
        decoder = _multiply_adds([*projections, (model.decoder, levels)])
    return Cost(whole, whole * model.num_visible / (model.grid[0] * model.grid[1]), decoder)


@contextmanager
def _layer_by_layer(decoder: nn.Module) -> Iterator[None]:
    """Count the layers as they are published, not merged where that is faster."""
    blocks = [module for module in decoder.modules() if isinstance(module, UNetBlock)]
    before = [block.merge for block in blocks]
    try:
        for block in blocks:
            block.merge = False
        yield
    finally:
        for block, merge in zip(blocks, before, strict=True):
            block.merge = merge


def _multiply_adds(calls: list[tuple[nn.Module, Any]]) -> float:
    with FlopCounterMode(display=False) as counter:
        for module, inputs in calls:
            run_on_meta(module, inputs)
    return counter.get_total_flops() / 2
