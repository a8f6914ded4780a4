"""Batches of a backend, and how they are held against those of another."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from spark_fast.pipelines import Batch
from spark_fast.pipelines.transforms.resize import MEAN, STD
from tests.pipelines.building import build


def batches(root: Path, epoch: int = 0, start_step: int = 0, **settings: object) -> list[Batch]:
    """An epoch of the default pipeline, from `start_step`."""
    settings = {"batch_size": 6, "input_size": 32, "seed": 5} | settings
    pipeline = build(root, **settings)
    try:
        return list(pipeline.epoch(epoch, start_step))
    finally:
        pipeline.close()


dali_batches = partial(batches, pipeline="dali", batch_size=12)
ffcv_batches = partial(batches, pipeline="ffcv", batch_size=12)


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and torch.equal(a.ids, b.ids)
        for a, b in zip(left, right, strict=True)
    )


def pixels(images: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) normalised -> (B, H, W, 3) in 0 ... 255."""
    return 255 * (images.float().permute(0, 2, 3, 1).numpy() * STD + MEAN)


def alike(left: list[Batch], right: list[Batch], tolerance: float = 0.6) -> bool:
    """Same samples, each showing the same picture up to the rounding of two resize kernels."""
    assert [b.ids.tolist() for b in left] == [b.ids.tolist() for b in right]
    assert [b.labels.tolist() for b in left] == [b.labels.tolist() for b in right]
    worst = max(
        np.abs(pixels(a.images) - pixels(b.images)).mean((1, 2, 3)).max() for a, b in zip(left, right, strict=True)
    )
    return bool(worst < tolerance)
