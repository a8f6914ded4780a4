"""SparK on one page: mask, encode, densify, decode, loss (Tian et al., ICLR 2023, section 3).

The encoder sees the visible patches alone and returns them packed, (V, C_i, b_i, b_i) per level. Densifying
normalises them, lays them out on the whole map with a learned token in every hole, and projects to the decoder's
width. The decoder is dense; its loss is taken on the masked patches.

Names: B images of H x W, patch p px, grid (h, w) = (H/p, W/p), V visible patches in the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from timm.layers import LayerNorm2d, convert_sync_batchnorm
from torch import Tensor, nn

from spark_fast.decoder import Decoder
from spark_fast.decoder.densify import densify
from spark_fast.encoder import Encoder, MaskedEncoder, PackedEncoder, VisiblePatches
from spark_fast.encoder.pyramid import as_size
from spark_fast.encoder.sparseconvnet import SparseEncoder
from spark_fast.encoder.verified_networks import is_verified
from spark_fast.encoder.verify import verify
from spark_fast.masking import num_visible
from spark_fast.networks import build_network

log = logging.getLogger("spark_fast")

ENCODERS: dict[str, type[Encoder]] = {
    "packed": PackedEncoder,
    "masked": MaskedEncoder,
    "sparseconvnet": SparseEncoder,
}


class SparK(nn.Module):
    """Masked image modelling with a ConvNet encoder.

    Args:
        encoder: an encoder of visible patches.
        input_size: (H, W) in pixels.
        mask_ratio: share of the patches hidden, 0.6 as published.
        decoder_width: channels of the decoder at the coarsest level; level i has decoder_width // 2^i.

    Attributes:
        patch: pixels per patch side.
        grid: (h, w), patches per image.
        num_visible: visible patches per image.
        sparse_projections: compute the 3x3 projections into the decoder from the visible cells; None, the default:
            where that pays.

    Raises:
        ValueError: a mask ratio or a decoder width that does not fit; the message has the limit.
    """

    sparse_projections: bool | None = None

    def __init__(
        self, encoder: Encoder, input_size: tuple[int, int], mask_ratio: float = 0.6, decoder_width: int = 768
    ) -> None:
        super().__init__()
        self.input_size, self.patch = input_size, encoder.patch
        self.grid = (input_size[0] // self.patch, input_size[1] // self.patch)
        self.num_visible = num_visible(self.grid, mask_ratio)
        self.encoder = encoder
        self.decoder = Decoder(self.patch, decoder_width)
        norm = _densify_norm(encoder)
        self.densify_norms, self.densify_projs = nn.ModuleList(), nn.ModuleList()
        self.mask_tokens = nn.ParameterList()
        for i, channels in enumerate(reversed(encoder.channels)):  # coarsest first
            self.densify_norms.append(norm(channels))
            self.densify_projs.append(_projection(channels, decoder_width // 2**i, coarsest=i == 0))
            token = nn.init.trunc_normal_(torch.zeros(1, channels, 1, 1), std=0.02, a=-0.02, b=0.02)
            self.mask_tokens.append(nn.Parameter(token))

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """The reconstruction loss of a batch, a scalar in fp32 (float64 for a float64 model).

        Args:
            images: (B, 3, H, W).
            visible: bool (B, h, w), True where visible; or int64 (B, L), the visible patches of each image as
                y*w + x ascending, which needs no look at the data; drawn when None.

        Raises:
            ValueError: images of another size, or a mask that keeps unequal numbers of patches.
        """
        patches = self._visible(images, visible)
        if patches.per_image == self.grid[0] * self.grid[1]:
            raise ValueError("the mask hides no patch: there is nothing to reconstruct")
        return self._loss(self._decode(images, patches), images, on=patches.complement())

    @torch.no_grad()
    def reconstruct(self, images: Tensor, visible: Tensor) -> Tensor:
        """Fill in the masked patches; visible pixels are kept to the bit.

        The decoder predicts patches normalised by their own mean and deviation, which are taken from `images`.

        Args:
            images: (B, 3, H, W).
            visible: as for `forward`.

        Returns:
            (B, 3, H, W) at the scale of `images`.

        Raises:
            ValueError: images of another size, or a mask that keeps unequal numbers of patches.
        """
        patches = self._visible(images, visible)
        holes = patches.complement()
        mean, std = _patch_statistics(holes.pack(images))
        filled = holes.pack(self._decode(images, patches)).to(images.dtype) * std + mean
        return torch.where(patches.cells(images.shape[2]), images, holes.unpack(filled))

    def encode(self, images: Tensor, visible: Tensor) -> list[Tensor]:
        """The features of the visible patches, as dense maps.

        Args:
            images: (B, 3, H, W).
            visible: as for `forward`.

        Returns:
            (B, C_i, H_i, W_i) per level, finest first, zero where masked.

        Raises:
            ValueError: images of another size, or a mask that keeps unequal numbers of patches.
        """
        patches = self._visible(images, visible)
        return [patches.unpack(f) for f in self.encoder(images, patches)]

    def _decode(self, images: Tensor, patches: VisiblePatches) -> Tensor:
        """Encode, densify, decode: (B, 3, H, W), every patch in units of its own deviation."""
        levels = []
        layers = zip(self.densify_norms, self.mask_tokens, self.densify_projs, strict=True)
        for features, (norm, token, project) in zip(reversed(self.encoder(images, patches)), layers, strict=True):
            levels.append(densify(norm(features), token.flatten(), project, patches, self.sparse_projections))
        return self.decoder(levels)

    @staticmethod
    def _loss(pixels: Tensor, images: Tensor, on: VisiblePatches) -> Tensor:
        """The squared error on these patches, each in units of its own deviation; both maps are (B, 3, H, W)."""
        predicted = on.pack(pixels)  # (M, 3, p, p)
        wide = torch.float64 if images.dtype == torch.float64 else torch.float32
        target = on.pack(images).to(wide)
        mean, std = _patch_statistics(target)
        return (predicted.to(wide) - (target - mean) / std).square().mean()

    def _visible(self, images: Tensor, visible: Tensor | None) -> VisiblePatches:
        """The patches that `visible` says, in either of its forms; drawn when None."""
        if tuple(images.shape[1:]) != (3, *self.input_size):
            raise ValueError(
                f"images must be (B, 3, {self.input_size[0]}, {self.input_size[1]}), got {tuple(images.shape)}"
            )
        if visible is None:
            keys = torch.rand(len(images), self.grid[0] * self.grid[1], device=images.device)
            visible = keys.argsort(dim=1)[:, : self.num_visible].sort(dim=1).values
        if visible.dtype == torch.int64 and visible.dim() == 2 and len(visible) == len(images):
            return VisiblePatches(visible, self.grid)
        if visible.dtype == torch.bool and tuple(visible.shape) == (len(images), *self.grid):
            return VisiblePatches.from_mask(visible)
        raise ValueError(
            f"visible must be bool ({len(images)}, {self.grid[0]}, {self.grid[1]}) or int64 ({len(images)}, L), "
            f"got {visible.dtype} {tuple(visible.shape)}"
        )


def build_spark(
    model: str | nn.Module = "resnet50",
    *,
    input_size: int | tuple[int, int] = 224,
    mask_ratio: float = 0.6,
    decoder_width: int = 768,
    encoder: str = "packed",
    model_kwargs: dict | None = None,
    stages: int | None = None,
    sync_batchnorm: bool = False,
    check: bool | None = None,
) -> SparK:
    """Build SparK around a ConvNet.

    Args:
        model: a timm name, your own as "package.module:function", or an nn.Module that returns a list of feature
            maps (it is converted in place).
        input_size: pixels, one number or (H, W); a multiple of the network's total stride.
        encoder: "packed", "masked" (dense maps with zeroed holes, as published), or "sparseconvnet" (see
            `spark_fast.encoder.sparseconvnet`).
        model_kwargs: passed to `timm.create_model`, e.g. {"drop_path_rate": 0.05}.
        stages: keep the first so many levels of the pyramid (stride 4, 8, 16, ...): 3 gives patches of 16 px, 2 of
            8 px. By default all, 32 px for most networks.
        sync_batchnorm: batch statistics over all ranks (`torch.nn.SyncBatchNorm`).
        check: run `verify`; None: unless the table of verified networks has this one.

    Raises:
        ValueError: an unknown model (the nearest names are given), one whose layers cannot be packed (named) or that
            `verify` finds wrong, or a size, mask ratio, number of stages or width that does not fit.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"unknown encoder {encoder!r}; there are {', '.join(ENCODERS)}")
    size = as_size(input_size)
    network = build_network(model, model_kwargs, stages) if isinstance(model, str) else model
    if check is None:
        check = not (isinstance(model, str) and is_verified(model, model_kwargs, stages))
    if check:
        log.info("checking that the packed encoder computes what the network computes")
        found = verify(network, stages=stages)
        log.info("it does: largest relative difference %.0e, leak %.0e", found.identity, found.leak)
    if sync_batchnorm:
        network = convert_sync_batchnorm(network)
    packed = ENCODERS[encoder](network, size, stages, keep=1 - mask_ratio)
    spark = SparK(packed, size, mask_ratio, decoder_width)
    if sync_batchnorm:
        for name in ("decoder", "densify_norms"):
            setattr(spark, name, convert_sync_batchnorm(getattr(spark, name)))
    return spark


def _densify_norm(encoder: nn.Module) -> Callable[[int], nn.Module]:
    """BatchNorm for networks that use it (ResNets), LayerNorm for the others (ConvNeXts), as published."""
    batch = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules())
    return nn.BatchNorm2d if batch else LayerNorm2d


def _projection(channels: int, width: int, coarsest: bool) -> nn.Module:
    """1x1 at the coarsest level, the identity if the widths agree there; 3x3 above."""
    if coarsest and channels == width:
        return nn.Identity()
    k = 1 if coarsest else 3
    return nn.Conv2d(channels, width, kernel_size=k, padding=k // 2)


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every patch, (M, 3, p, p) -> two (M, 1, 1, 1); unbiased variance plus 1e-6."""
    var, mean = torch.var_mean(patches, dim=(1, 2, 3), keepdim=True)
    return mean, (var + 1e-6).sqrt()
