"""Batch augmentation: random erasing, mixup, cutmix, soft targets.

Crop and flip come from the pipeline, as for pre-training. The rest is torchvision's and timm's, on the device; it draws
from the global generators, which the loop seeds at every step.
"""

from __future__ import annotations

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from spark_fast.evaluation.recipes import Recipe
from spark_fast.pipelines.transforms.resize import MEAN, STD

# torchvision rotates and shears tensors bilinearly at best; the published code does so on PIL images, bicubically
POLICIES = {
    "trivial": v2.TrivialAugmentWide,
    "auto": v2.AutoAugment,
    "rand": v2.RandAugment,
}


class Augment:
    """A policy of pixel operations, drawn for each photograph, then random erasing.

    (B, C, H, W) normalised, in and out; a policy is for photographs alone, see `recipe_for`.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        kind = POLICIES.get(str(recipe.augment))
        self._policy: nn.Module | None = kind(interpolation=InterpolationMode.BILINEAR) if kind else None
        self._mean, self._std = (torch.tensor(v, device=device)[:, None, None] * 255 for v in (MEAN, STD))
        self._erase = RandomErasing(recipe.erase, mode="pixel", device=str(device)) if recipe.erase else None

    def __call__(self, images: Tensor) -> Tensor:
        """Augment a batch, which may be changed."""
        if self._policy is not None:
            pixels = (images * self._std + self._mean).round().clamp(0, 255).to(torch.uint8)  # the decoder's bytes
            changed = torch.stack([self._policy(image) for image in pixels])
            images = ((changed - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
        return images if self._erase is None else self._erase(images)


class Mix:
    """Labels to soft targets, and in most recipes images mixed in pairs, by mixup or cutmix."""

    def __init__(self, recipe: Recipe, classes: int) -> None:
        self._classes, self._smoothing = classes, recipe.smoothing or 0.0
        self.mixes = bool(recipe.mixup or recipe.cutmix)
        self._mixup = Mixup(
            mixup_alpha=recipe.mixup or 0.0,
            cutmix_alpha=recipe.cutmix or 0.0,
            label_smoothing=self._smoothing,
            num_classes=classes,
        )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) and (B,) -> the same images, perhaps mixed, and (B, classes)."""
        if self.mixes:
            return self._mixup(images, labels)
        return images, mixup_target(labels, self._classes, smoothing=self._smoothing)
