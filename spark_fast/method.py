"""The base of all methods of masked image modelling: an encoder of visible patches, and a loss on the masked ones.

A method is one class in one file (`spark.py`, `fcmae.py`): it makes its decoder, says in `decode` what stands in the
masked patches, and names its defaults in a `Recipe`. The trainer, checkpoints, pictures and the dry run use
nothing of a method but what this file has; `docs/explanation/methods.md` shows how to write one.

Names: B images of H x W and C channels, K masks per image, patch p px, grid (h, w) = (H/p, W/p), L visible patches
per mask.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from spark_fast.encoder import Encoder, MaskedEncoder, PackedEncoder, VisiblePatches
from spark_fast.encoder.layers.synced_batch_norm import sync_batch_norms
from spark_fast.encoder.pyramid import as_size
from spark_fast.encoder.sparseconvnet import SparseEncoder
from spark_fast.encoder.verified_networks import is_verified
from spark_fast.encoder.verify import verify
from spark_fast.masking import check_masks, num_visible, sample_visible
from spark_fast.networks import build_network

log = logging.getLogger("spark_fast")

ENCODERS: dict[str, type[Encoder]] = {
    "packed": PackedEncoder,
    "masked": MaskedEncoder,
    "sparseconvnet": SparseEncoder,
}

METHODS = {"spark": "spark_fast.spark:SparK", "fcmae": "spark_fast.fcmae:FCMAE"}


def decays_by_default(name: str, value: Tensor) -> bool:
    """Whether weight decay acts on a parameter `value` of any shape, as in SparK (pretrain/utils/lr_control.py).

    It does not on 1-d tensors, biases, mask tokens and layer scale.
    """
    exempt = ("cls_token", "pos_embed", "mask_token", "gamma")
    return value.dim() != 1 and not name.endswith(".bias") and not any(part in name for part in exempt)


@dataclass(frozen=True)
class Recipe:
    """How a method is trained unless the user says otherwise; the defaults are SparK's.

    Attributes:
        settings: defaults of the command's settings, by their names, where they differ.
        first_lr: learning rate at the first step of the warm-up, as a share of the peak.
        last_lr: learning rate at the end of the half cosine, as a share of the peak.
        closed: the half cosine ends at the last step; else one step later.
        decays: whether weight decay acts on a parameter, by its name and value.
    """

    settings: Mapping[str, str | float] = field(default_factory=dict)
    first_lr: float = 0.005
    last_lr: float = 0.001
    closed: bool = True
    decays: Callable[[str, Tensor], bool] = decays_by_default

    @property
    def schedule(self) -> tuple[float, float, bool]:
        """The last three fields of `spark_fast.training.schedule.Schedule`."""
        return self.first_lr, self.last_lr, self.closed


class Method(nn.Module):
    """Masked image modelling with a ConvNet encoder: the base of the methods.

    Args:
        encoder: an encoder of visible patches.
        input_size: (H, W) in pixels.
        mask_ratio: share of the patches hidden.

    Attributes:
        options: the class's further arguments; each is a setting of the command, of the same name.
        recipe: how the method is trained by default.
        rounds_down: the number of visible patches is rounded down; else to the nearest.
        in_chans: channels of the images, C.
        patch: pixels per patch side.
        grid: (h, w), patches per image.
        num_visible: visible patches per mask, L.

    Raises:
        ValueError: a mask ratio that does not fit; the message has the limit.
    """

    options: ClassVar[tuple[str, ...]] = ()
    recipe: ClassVar[Recipe] = Recipe()
    rounds_down: ClassVar[bool] = False

    def __init__(self, encoder: Encoder, input_size: tuple[int, int], mask_ratio: float) -> None:
        super().__init__()
        self.input_size, self.patch, self.in_chans = input_size, encoder.patch, encoder.in_chans
        self.grid = (input_size[0] // self.patch, input_size[1] // self.patch)
        self.num_visible = self.visible_at(mask_ratio)
        self.encoder = encoder

    def decode(self, features: list[Tensor], visible: VisiblePatches, on: VisiblePatches) -> Tensor:
        """The pixels of the patches `on`, from the features of the visible ones.

        Args:
            features: per level of the encoder, finest first, (V, C_i, b_i, b_i).
            visible, on: patches of B*K masks, those of one image next to one another.

        Returns:
            (M, C, p, p) for the M patches of `on`, each normalised by its own mean and standard deviation.
        """
        raise NotImplementedError

    def visible_at(self, mask_ratio: float) -> int:
        """Visible patches per mask at this ratio. Raises ValueError: see `masking.num_visible`."""
        return num_visible(self.grid, mask_ratio, down=self.rounds_down)

    def layer_by_layer(self) -> AbstractContextManager[None]:
        """A context in which every layer is computed by itself, as in the published code: to count its FLOPs."""
        return nullcontext()

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """The reconstruction loss of a batch, a scalar in fp32 (float64 for a float64 model).

        It is the `loss` on the masked patches.

        Args:
            images: (B, C, H, W).
            visible: bool (B*K, h, w), True where visible; or int64 (B*K, L), the visible patches of each mask as
                y*w + x ascending, which needs no host sync; None: one mask per image is drawn.

        Raises:
            ValueError: images of another size, or a mask that keeps unequal numbers of patches.
        """
        patches = self.visible_patches(images, visible)
        if patches.num_visible == self.grid[0] * self.grid[1]:
            raise ValueError("the mask hides no patch: there is nothing to reconstruct")
        return self.loss(images, patches, on=patches.complement())

    def loss(self, images: Tensor, visible: VisiblePatches, on: VisiblePatches) -> Tensor:
        """The mean squared error on the patches `on`, each normalised by its own mean and standard deviation: a scalar.

        `images` is (B, C, H, W). Raises ValueError if `decode` returns another shape than the patches'.
        """
        predicted = self.decode(self.encoder(images, visible), visible, on)
        wide = torch.float64 if images.dtype == torch.float64 else torch.float32
        target = on.pack(images).to(wide)
        if predicted.shape != target.shape:  # a prediction of one channel would be compared with each of many
            raise ValueError(
                f"decode must return {tuple(target.shape)}, the pixels of the patches, got {tuple(predicted.shape)}"
            )
        mean, std = _patch_statistics(target)
        return (predicted.to(wide) - (target - mean) / std).square().mean()

    @torch.no_grad()
    def reconstruct(self, images: Tensor, visible: Tensor) -> Tensor:
        """Fill in the masked patches; visible pixels are kept to the bit.

        Predicted patches are normalised; their means and standard deviations are taken from `images`. In training mode
        batch norms use the statistics of these images and update their running ones, as in any forward pass.

        Args:
            images: (B, C, H, W).
            visible: as for `forward`.

        Returns:
            (B*K, C, H, W) at the scale of `images`.

        Raises:
            ValueError: images of another size, or a mask that keeps unequal numbers of patches.
        """
        patches = self.visible_patches(images, visible)
        hidden = patches.complement()
        mean, std = _patch_statistics(hidden.pack(images))
        filled = self.decode(self.encoder(images, patches), patches, hidden).to(images.dtype) * std + mean
        images = patches.repeat_images(images)
        return torch.where(patches.cells(images.shape[2]), images, hidden.unpack(filled))

    def encode(self, images: Tensor, visible: Tensor) -> list[Tensor]:
        """The features of the visible patches, as dense maps; in training mode they update running statistics.

        Args:
            images: (B, C, H, W).
            visible: as for `forward`.

        Returns:
            (B*K, C_i, H_i, W_i) per level, finest first, zero where masked.

        Raises:
            ValueError: images of another size, or a mask that keeps unequal numbers of patches.
        """
        patches = self.visible_patches(images, visible)
        return [patches.unpack(f) for f in self.encoder(images, patches)]

    def sample_masks(
        self, seed: int, step: int, positions: Tensor, masks: int = 1, num_visible: int | None = None
    ) -> Tensor:
        """The masks of the images at `positions` (B,) of the global batch of `step`: see `masking.sample_visible`.

        Args:
            masks: of each image; no two of them show the same patch.
            num_visible: visible patches per mask, None for as many as in training.

        Returns:
            (B*masks, L) int64, for `forward`.

        Raises:
            ValueError: so many masks would share patches.
        """
        num_visible = num_visible or self.num_visible
        check_masks(self.grid, num_visible, masks)
        return sample_visible(seed, step, positions, self.grid, num_visible, masks)

    def visible_patches(self, images: Tensor, visible: Tensor | None) -> VisiblePatches:
        """The patches of `visible` for `images`, (B, C, H, W): bool (B*K, h, w) or int64 (B*K, L), see `forward`.

        Raises:
            ValueError: images of another size than the model's, a mask of another shape, or (seen on the CPU alone,
                as it would be a host sync) patches that are outside the grid or named twice.
        """
        if tuple(images.shape[1:]) != (expected := (self.in_chans, *self.input_size)):
            raise ValueError(f"images must be (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}")
        if visible is None:
            keys = torch.rand(len(images), self.grid[0] * self.grid[1], device=images.device)
            visible = keys.argsort(dim=1)[:, : self.num_visible].sort(dim=1).values
        whole = len(images) > 0 and len(visible) % len(images) == 0  # so many masks of each image
        if whole and visible.dtype == torch.int64 and visible.dim() == 2:
            _check_indices(visible, self.grid)
            return VisiblePatches(visible, self.grid)
        if whole and visible.dtype == torch.bool and tuple(visible.shape[1:]) == self.grid:
            return VisiblePatches.from_mask(visible)
        raise ValueError(
            f"visible must be bool ({len(images)}, {self.grid[0]}, {self.grid[1]}) or int64 ({len(images)}, L), "
            f"or so for a multiple of {len(images)} masks; got {visible.dtype} {tuple(visible.shape)}"
        )


def method_class(name: str) -> type[Method]:
    """The class of a method by its name in METHODS, or your own as "package.module:Class".

    Raises:
        ValueError: an unknown name, or one that is no method.
    """
    module, _, cls = METHODS.get(name, name).partition(":")
    if not cls:
        raise ValueError(
            f"unknown method {name!r}: choose one of {', '.join(METHODS)}, or your own as package.module:Class"
        )
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"{name} is no subclass of spark_fast.method.Method")
    return found


M = TypeVar("M", bound=Method)


def build(
    kind: type[M],
    model: str | nn.Module,
    *,
    input_size: int | tuple[int, int] = 224,
    mask_ratio: float = 0.6,
    encoder: str = "packed",
    model_kwargs: dict | None = None,
    stages: int | None = None,
    in_chans: int = 3,
    sync_batchnorm: bool = False,
    check: bool | None = None,
    **options: object,
) -> M:
    """Build a method around a ConvNet.

    Args:
        kind: the method's class.
        model: a timm name, your own as "package.module:function", or an nn.Module that returns a list of feature
            maps (it is converted in place).
        input_size: pixels, one number or (H, W); a multiple of the network's total stride.
        encoder: "packed", "masked" (dense maps with zeroed holes, as published), or "sparseconvnet" (see
            `spark_fast.encoder.sparseconvnet`).
        model_kwargs: passed to `timm.create_model`, e.g. {"drop_path_rate": 0.05}.
        stages: keep the first so many levels of the pyramid (stride 4, 8, 16, ...): 3 gives patches of 16 px, 2 of
            8 px. By default all, 32 px for most networks.
        in_chans: channels of the images; timm builds its network for them, one of your own must take as many.
        sync_batchnorm: batch statistics over all ranks of `torch.distributed`, with equally many images on each.
        check: run `verify`; None: unless the table of verified networks has this one.
        options: further arguments of the class.

    Raises:
        ValueError: an unknown model (the nearest names are given), one whose layers cannot be packed (named) or that
            `verify` finds wrong, or a size, mask ratio, number of stages or width that does not fit.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"unknown encoder {encoder!r}: choose one of {', '.join(ENCODERS)}")
    size = as_size(input_size)
    network = build_network(model, model_kwargs, stages, in_chans) if isinstance(model, str) else model
    if check is None:
        check = not (isinstance(model, str) and is_verified(model, model_kwargs, stages, in_chans))
    if check:
        log.info("checking that the packed encoder computes what the network computes")
        found = verify(network, stages=stages, in_chans=in_chans)
        log.info("it does: largest relative difference %.0e, leak %.0e", found.identity, found.leak)
    if sync_batchnorm:
        sync_batch_norms(network)
    encoding = ENCODERS[encoder](network, size, stages, 1 - mask_ratio, in_chans)
    try:
        made = kind(encoding, size, mask_ratio, **options)
    except Exception:
        encoding.restore_layers()  # so that the network can be used in another try
        raise
    if sync_batchnorm:
        sync_batch_norms(made)  # what the method adds
    return made


def _check_indices(visible: Tensor, grid: tuple[int, int]) -> None:
    """Refuse patches (B*K, L) that are outside the grid, or named twice in one mask."""
    if visible.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ascending, count = visible.sort(dim=1).values, grid[0] * grid[1]
    wrong = (ascending[:, 1:] == ascending[:, :-1]).any(1) | (ascending < 0).any(1) | (ascending >= count).any(1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"visible[{row}] is {visible[row].tolist()}: each mask must name different patches from 0 to {count - 1}"
        )


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every patch, (M, C, p, p) -> two (M, 1, 1, 1); unbiased variance plus 1e-6."""
    var, mean = torch.var_mean(patches, dim=(1, 2, 3), keepdim=True)
    return mean, (var + 1e-6).sqrt()
