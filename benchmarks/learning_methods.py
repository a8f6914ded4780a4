"""What `learning.py` compares: its pre-trainings and fine-tunings, and the methods that they are of.

The variants of the ablations live here and not in the product: each changes one thing and keeps the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spark_fast.encoder import Encoder, MaskedEncoder, PackedEncoder, VisiblePatches
from spark_fast.fcmae import FCMAE
from spark_fast.method import Method
from spark_fast.networks import build_network
from spark_fast.spark import SparK

SIZE = 64  # pixels
STAGES = 2  # patches of 8 px


class ZeroedEncoder(MaskedEncoder):
    """Zero-outing: the ordinary dense network on an image with its masked pixels zeroed."""

    def forward(self, images: Tensor, visible: VisiblePatches | None = None) -> list[Tensor]:
        """As of any encoder; no layer knows of the mask, and what they left in the holes is dropped at the end."""
        if visible is None:
            return super().forward(images)
        return self._leave(super().forward(self._enter(images, visible)), visible)


class LastLevelEncoder(PackedEncoder):
    """No hierarchy: the decoder is fed from the last level alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.levels, self.channels, self.strides = self.levels[-1:], self.channels[-1:], self.strides[-1:]


class LossOnAllPatches(SparK):
    """The loss is taken on visible patches, too."""

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """The loss, a scalar."""
        patches = torch.arange(self.grid[0] * self.grid[1], device=images.device).expand(len(images), -1)
        return self.loss(images, self.visible_patches(images, visible), on=VisiblePatches(patches, self.grid))


PUBLISHED = "as published"
FCMAE_VARIANT = "FCMAE"
VARIANTS: dict[str, tuple[type[Encoder], Callable[..., Method]]] = {
    PUBLISHED: (PackedEncoder, SparK),
    "zero-outing": (ZeroedEncoder, SparK),
    "no hierarchy": (LastLevelEncoder, SparK),
    "loss on all patches": (PackedEncoder, LossOnAllPatches),
}
METHODS: dict[str, tuple[type[Encoder], Callable[..., Method]]] = VARIANTS | {FCMAE_VARIANT: (PackedEncoder, FCMAE)}


@dataclass(frozen=True)
class Pretraining:
    """One pre-training; `seed` decides weights, order, crops and masks.

    Attributes:
        width: channels of the decoder.
        variant: a key of METHODS.
        images: share of the training images, the same for every seed.
        masks: of each image.
        lr: per 256 images; None: the one that all runs have in common.
        judged: by k-NN, before the first step and then so often: "tuning" on training images, "test" on the test
            images; "" not at all.
        points: of that, spread over the run.
    """

    network: str
    epochs: int
    width: int
    variant: str = PUBLISHED
    mask: float = 0.6
    seed: int = 0
    images: float = 1.0
    masks: int = 1
    lr: float | None = None
    judged: str = ""
    points: int = 1

    @property
    def work(self) -> float:
        """About, in epochs of fine-tuning: the decoder makes a step cost some three times as much."""
        return 3.0 * self.epochs * self.images

    @property
    def name(self) -> str:
        """Of its folder."""
        words = [self.network, self.variant, f"mask {self.mask}", f"width {self.width}", f"{self.epochs} epochs"]
        words += [f"{self.masks} masks"] if self.masks > 1 else []
        words += [f"rate {self.lr:g}"] if self.lr is not None else []
        words += [f"judged by {self.judged}"] if self.judged else []
        return "_".join((*words, f"{self.images:.0%} of the images", f"seed {self.seed}")).replace(" ", "-")


@dataclass(frozen=True)
class Finetuning:
    """One fine-tuning, `before` of what was pre-trained, or from scratch; `seed` decides the labelled images, too."""

    network: str
    before: Pretraining | None
    share: float  # of the training images, labelled
    epochs: int
    lr: float
    seed: int
    held_out: bool = False  # judged by training images that are never learned from

    @property
    def work(self) -> float:
        """About, in epochs over all images: the tenth is for judging."""
        return self.share * self.epochs + 0.1


def build(run: Pretraining, channels: int = 3) -> Method:
    """FCMAE, or SparK with the one thing changed that the variant says; `channels` of the images."""
    encoder, method = METHODS[run.variant]
    packed = encoder(
        build_network(own(run.network)), (SIZE, SIZE), STAGES, visible_ratio=1 - run.mask, in_chans=channels
    )
    return method(packed, (SIZE, SIZE), run.mask, run.width)


def own(network: str) -> str:
    """The name by which the commands know a network of `learning_networks`."""
    return f"learning_networks:{network}"
