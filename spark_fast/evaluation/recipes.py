"""The published recipes of fine-tuning on ImageNet, per network (SparK, downstream_imagenet/arg.py, data.py, util.py).

What they share is `SHARED`: random crops of 8 to 100 % of the area, TrivialAugment, random erasing, mixup or cutmix on
every batch, label smoothing 0.1; LAMB with binary cross-entropy for ResNets, AdamW with cross-entropy for ConvNeXts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from tyro.conf import arg

log = logging.getLogger("spark_fast")


@dataclass
class Recipe:
    """How the network is fine-tuned; the defaults are the recipe published for it."""

    epochs: Annotated[int | None, arg(aliases=["--ep"])] = None
    """passes over the data"""
    warmup_epochs: Annotated[int | None, arg(aliases=["--wp_ep"])] = None
    """epochs of linear warm-up"""
    optimizer: Annotated[Literal["lamb", "adamw", "sgd"] | None, arg(aliases=["--opt"])] = None
    """lamb (ResNets), adamw (ConvNeXts), sgd (Nesterov momentum 0.9)"""
    base_lr: float | None = None
    """learning rate per 256 images: lr = base_lr * batch_size / 256"""
    layer_decay: Annotated[float | None, arg(aliases=["--lr_scale"])] = None
    """learning rate of a layer as a share of the next layer's; 1: the same for all"""
    weight_decay: Annotated[float | None, arg(aliases=["--wd"])] = None
    """weight decay"""
    loss: Literal["bce", "ce"] | None = None
    """bce (binary cross-entropy of each class) or ce (cross-entropy)"""
    mixup: float | None = None
    """alpha of mixup; 0: none"""
    cutmix: float | None = None
    """alpha of cutmix, which alternates with mixup; 0: none"""
    smoothing: float | None = None
    """label smoothing"""
    repeats: Annotated[int | None, arg(aliases=["--rep_aug"])] = None
    """repeated augmentation: views per image in an epoch, which then has that many times fewer images; 1: none"""
    augment: Literal["trivial", "auto", "rand", "none"] | None = None
    """trivial (TrivialAugmentWide), auto (AutoAugment), rand (RandAugment), or none (only crop and flip)"""
    erase: float | None = None
    """probability of random erasing"""
    min_scale: float | None = None
    """smallest share of an image's area in a random crop"""
    drop_path: Annotated[float | None, arg(aliases=["--dp"])] = None
    """stochastic depth"""
    ema: float | None = None
    """decay of the moving average of the weights, per step; 0: none"""
    clip: float | None = None
    """clip the total gradient norm to this value; 0: no clipping"""
    accumulate: int | None = None
    """backward passes per step; the batch of each rank is split into that many parts"""


SHARED = Recipe(
    layer_decay=0.7,
    cutmix=1.0,
    smoothing=0.1,
    augment="trivial",
    erase=0.25,
    min_scale=0.08,
    ema=0.9999,
    clip=0.0,
    accumulate=1,
)
CONVNEXT = replace(
    SHARED, epochs=400, warmup_epochs=20, optimizer="adamw", loss="ce", weight_decay=0.01, mixup=0.8, repeats=3
)
RESNET = replace(
    SHARED, epochs=300, warmup_epochs=5, optimizer="lamb", loss="bce", weight_decay=0.02, mixup=0.1, repeats=1
)
DEEP_RESNET = replace(RESNET, base_lr=0.001, layer_decay=0.8, drop_path=0.2)

RECIPES: dict[str, tuple[int, Recipe]] = {  # with the batch size
    "convnext_small": (4096, replace(CONVNEXT, base_lr=2e-4, drop_path=0.3)),
    "convnext_base": (4096, replace(CONVNEXT, base_lr=1e-4, drop_path=0.4)),
    "convnext_large": (
        4096, replace(CONVNEXT, epochs=200, warmup_epochs=10, base_lr=1e-4, weight_decay=0.02, drop_path=0.5),
    ),
    "resnet50": (2048, replace(RESNET, base_lr=0.002, drop_path=0.05)),
    "resnet101": (2048, DEEP_RESNET),
    "resnet152": (2048, DEEP_RESNET),
    "resnet200": (2048, DEEP_RESNET),
}  # fmt: skip
LARGE_384 = (
    1024,
    replace(CONVNEXT, epochs=200, base_lr=6e-5, drop_path=0.5, ema=0.99995),
)  # of convnext_large
LARGE = 384  # pixels from which on images are augmented by AutoAugment and judged whole


def recipe_for(network: str, size: tuple[int, int], photographs: bool = True) -> tuple[int, float, Recipe]:
    """Batch size, share of the central crop, and the recipe, every field of it set; without one, that of its kin.

    Args:
        size: (H, W) of the input.
        photographs: what is none is augmented by crop, flip and erasing alone.
    """
    kin = "convnext_small" if "convnext" in network else "resnet50"
    if network not in RECIPES:
        log.info("no recipe is published for %s: the defaults are those of %s", network, kin)
    batch_size, recipe = RECIPES.get(network, RECIPES[kin])
    crop_pct, augment = 0.95, recipe.augment
    if min(size) >= LARGE:
        crop_pct, augment = 1.0, "auto"
        if network == "convnext_large":
            batch_size, recipe = LARGE_384
    if not photographs:
        log.info("the recipe's augmentation is for photographs: it is not used for these images")
        augment = "none"
    return batch_size, crop_pct, replace(recipe, augment=augment)  # the caller's own
