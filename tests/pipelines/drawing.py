"""The crop and flip that a sample's random numbers give it, as every backend must show it."""

from __future__ import annotations

from spark_fast.pipelines.sampler import uniform
from spark_fast.pipelines.transforms.crops import DRAWS, Augmentation, Box


def drawn(
    augmentation: Augmentation, seed: int, draw_id: int, sample: int, height: int, width: int
) -> tuple[Box, bool]:
    """Of a sample whose image has this size."""
    (draws,) = uniform(seed, draw_id, [sample], DRAWS).tolist()
    return augmentation.box(draws, height, width), augmentation.flips(draws)
