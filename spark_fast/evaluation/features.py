"""Features of all images, from one pass through the frozen network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spark_fast.evaluation.backbone import Backbone
from spark_fast.evaluation.data import Labelled

Features = Callable[[Tensor], Tensor]  # images (B, C, H, W) -> (B, F) fp32


def frozen(backbone: Backbone, device: torch.device, dtype: torch.dtype) -> Features:
    """The backbone on its device, (B, C, H, W) -> (B, F) fp32, computing in `dtype`."""
    backbone = backbone.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return backbone(images)

    return features


def extract(features: Features, data: Labelled) -> tuple[Tensor, Tensor]:
    """Features (N, C) and labels (N,) of this rank's images, in their order; N is 0 where the rank has none."""
    found = [(features(images), labels) for images, labels in data.epoch()]
    if not found:
        return torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
    feature_rows, labels = zip(*found, strict=True)
    return torch.cat(feature_rows), torch.cat(labels)
