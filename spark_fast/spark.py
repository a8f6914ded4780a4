"""SparK on one page: mask, encode, densify, decode (Tian et al., ICLR 2023, section 3).

The encoder sees the visible patches alone and returns them packed, (V, C_i, b_i, b_i) per level. Densifying
normalises them, lays them out on the whole map with a learned token in every hole, and projects to the decoder's
width. The decoder is dense; the loss (`Method.forward`) is taken on the masked patches.

Names: B images of H x W, K masks per image, patch p px, grid (h, w) = (H/p, W/p), V visible patches in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from spark_fast import method
from spark_fast.decoder import Decoder, UNetBlock
from spark_fast.decoder.densify import densify
from spark_fast.encoder import Encoder, VisiblePatches
from spark_fast.encoder.convert_network import convert_layers
from spark_fast.encoder.layers.batch_norm import normalize
from spark_fast.encoder.layers.layer_norm import ChannelNorm
from spark_fast.method import Method


class SparK(Method):
    """A dense UNet decoder from all levels of the encoder.

    Args:
        encoder: an encoder of visible patches.
        input_size: (H, W) in pixels.
        mask_ratio: share of the patches hidden, 0.6 as published.
        decoder_width: channels of the decoder at the coarsest level; level i has decoder_width // 2^i.

    Attributes:
        sparse_projections: compute the 3x3 projections into the decoder from the visible cells; None, the default:
            where that pays.

    Raises:
        ValueError: a mask ratio or a decoder width that does not fit; the message has the limit.
    """

    options = ("decoder_width",)
    sparse_projections: bool | None = None

    def __init__(
        self, encoder: Encoder, input_size: tuple[int, int], mask_ratio: float = 0.6, decoder_width: int = 768
    ) -> None:
        super().__init__(encoder, input_size, mask_ratio)
        self.decoder = Decoder(self.patch, decoder_width, self.in_chans)
        norm_type = _densify_norm(encoder)
        self.densify_norms, self.densify_projs = nn.ModuleList(), nn.ModuleList()
        self.mask_tokens = nn.ParameterList()
        for i, channels in enumerate(reversed(encoder.channels)):  # coarsest first
            norm, _ = convert_layers(norm_type(channels), {"layer_norm": ChannelNorm}, encoder.context)
            project = _projection(channels, decoder_width // 2**i, coarsest=i == 0)
            if isinstance(norm, ChannelNorm):
                norm.rounded = isinstance(project, nn.Conv2d)
            self.densify_norms.append(norm)
            self.densify_projs.append(project)
            token = nn.init.trunc_normal_(torch.zeros(1, channels, 1, 1), std=0.02, a=-0.02, b=0.02)
            self.mask_tokens.append(nn.Parameter(token))

    @contextmanager
    def layer_by_layer(self) -> Iterator[None]:
        """No merged layers, and projections of whole maps."""
        blocks = [module for module in self.decoder.modules() if isinstance(module, UNetBlock)]
        before = self.sparse_projections, [block.merge for block in blocks]
        try:
            self.sparse_projections = False
            for block in blocks:
                block.merge = False
            yield
        finally:
            self.sparse_projections = before[0]
            for block, merge in zip(blocks, before[1], strict=True):
                block.merge = merge

    def decode(self, features: list[Tensor], visible: VisiblePatches, on: VisiblePatches) -> Tensor:
        """See `Method.decode`: (M, C, p, p). Every level is densified and the whole image decoded."""
        levels, kernels = [], self.encoder.context.kernels
        layers = zip(self.densify_norms, self.mask_tokens, self.densify_projs, strict=True)
        for level, (norm, token, project) in zip(reversed(features), layers, strict=True):
            level = normalize(norm, None, level, None, kernels)
            levels.append(densify(level, token.flatten(), project, visible, self.sparse_projections))
        return on.pack(self.decoder(levels, kernels))


def build_spark(
    model: str | nn.Module = "resnet50",
    *,
    input_size: int | tuple[int, int] = 224,
    mask_ratio: float = 0.6,
    decoder_width: int = 768,
    encoder: str = "packed",
    model_kwargs: dict | None = None,
    stages: int | None = None,
    in_chans: int = 3,
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
        in_chans: channels of the images; timm builds its network for them, one of your own must take as many.
        sync_batchnorm: batch statistics over all ranks of `torch.distributed`, with equally many images on each.
        check: run `verify`; None: unless the table of verified networks has this one.

    Raises:
        ValueError: an unknown model (the nearest names are given), one whose layers cannot be packed (named) or that
            `verify` finds wrong, or a size, mask ratio, number of stages or width that does not fit.
    """
    return method.build(
        SparK,
        model,
        input_size=input_size,
        mask_ratio=mask_ratio,
        encoder=encoder,
        model_kwargs=model_kwargs,
        stages=stages,
        in_chans=in_chans,
        sync_batchnorm=sync_batchnorm,
        check=check,
        decoder_width=decoder_width,
    )


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
