"""The kind of each type of layer: the table by which a network is packed, or refused by name.

pointwise         sees one cell at a time: unchanged
layer_norm        a LayerNorm over the channels of one cell: under autocast on a GPU by a kernel
norm              its statistics run over all cells of the batch (BatchNorm): unchanged when packed
conv, pool        looks across the edge of a patch: takes its halo first
local             looks across it otherwise (blurring, bilinear resizing): computed on the dense map
global_reduction  reduces over an image and returns the map: over the image's visible cells
response_norm     one of them, timm's GlobalResponseNorm: in fewer passes than its own
image_pool        reduces an image to one cell: over the image's visible cells
per_image         draws a random number per image
block             its own `forward` mixes positions (`layers/timm_blocks.py`), or runs in fewer passes with the norms'
                  kernels (`layers/residual_blocks.py`, `layers/convnext_block.py`): reimplemented
"""

from __future__ import annotations

import re
from types import ModuleType

import timm.layers as tl
from timm.layers import activations as timm_activations
from timm.layers import cbam, grn, layer_scale, pool2d_same, selective_kernel
from timm.models import (
    _efficientnet_blocks,
    convnext,
    efficientformer,
    fastvit,
    focalnet,
    hgnet,
    metaformer,
    mlp_mixer,
    nfnet,
    resnet,
    selecsls,
    senet,
    swiftformer,
)
from torch import nn
from torch.nn.modules import activation as torch_activations

from spark_fast.encoder.layers import residual_blocks
from spark_fast.encoder.layers import timm_blocks as blocks
from spark_fast.encoder.layers.convnext_block import FusedConvNeXtBlock
from spark_fast.encoder.layers.synced_batch_norm import SYNCED


class UnsupportedLayerError(ValueError):
    """A network has a layer that cannot be packed; the message names its place and type."""


def _activations() -> set[type]:
    """Every elementwise activation of torch and timm (not attention, not a softmax)."""
    modules = (torch_activations, timm_activations)
    found = {c for m in modules for c in vars(m).values() if isinstance(c, type) and issubclass(c, nn.Module)}
    return {c for c in found if "Softmax" not in c.__name__ and "Softmin" not in c.__name__} - {
        nn.Module,
        nn.MultiheadAttention,
        nn.GLU,
    }


LAYER_KINDS: dict[type, str] = {}
REDUCTIONS = ("global_reduction", "image_pool", "per_image")


def register(kind: str, *types: type) -> None:
    """Say of what kind your own layers are, e.g. `register("pointwise", MyScale)`.

    Args:
        kind: pointwise, layer_norm, norm, conv, pool, local, global_reduction, image_pool or per_image, as this
            module's text explains them.
        types: the layers' classes; subclasses are not included.

    Raises:
        ValueError: an unknown kind.
        TypeError: an instance, or whatever else is no class.
    """
    known = ("pointwise", "norm", "layer_norm", "response_norm", "conv", "pool", "local", *REDUCTIONS)
    if kind not in known:
        raise ValueError(f"unknown kind of layer {kind!r}: choose one of {', '.join(known)}")
    for given in types:
        if not isinstance(given, type):
            raise TypeError(f"register takes classes, such as nn.ReLU, got {given!r}")
    LAYER_KINDS.update(dict.fromkeys(types, kind))


def _timm(module: ModuleType, *names: str) -> list[type]:
    """The types that this version of timm has."""
    return [vars(module)[n] for n in names if n in vars(module)]


register("pointwise", *_activations(), nn.Identity, nn.Dropout, nn.Linear, nn.ChannelShuffle)
register("pointwise", nn.PixelShuffle, nn.PixelUnshuffle)  # whole patches only: checked by tracing
register("layer_norm", nn.LayerNorm, *_timm(tl, "LayerNorm", "LayerNorm2d"))
register("layer_norm", *_timm(metaformer, "LayerNorm2dNoBias", "LayerNormNoBias"))
register("pointwise", *_timm(tl, "LayerNormAct2d", "RmsNorm2d", "RmsNormAct2d"))
register("pointwise", *_timm(tl, "SimpleNorm2d", "SpaceToDepth", "DepthToSpace"))
register("pointwise", *_timm(layer_scale, "LayerScale", "LayerScale2d"))
register("pointwise", *_timm(metaformer, "Scale"))
register("pointwise", *_timm(fastvit, "LayerScale2d"), *_timm(swiftformer, "LayerScale2d"))
register("pointwise", *_timm(efficientformer, "LayerScale2d"), *_timm(hgnet, "LearnableAffineBlock"))
register("pointwise", *_timm(nfnet, "GammaAct"), *_timm(selecsls, "SelectSeq"))
register("norm", *SYNCED, *SYNCED.values(), nn.SyncBatchNorm, *_timm(tl, "SyncBatchNormAct", "FrozenBatchNormAct2d"))
register("norm", *_timm(tl, "EvoNorm2dB0", "EvoNorm2dB1", "EvoNorm2dB2"))
register("conv", nn.Conv2d, *_timm(tl, "Conv2dSame", "StdConv2d", "StdConv2dSame", "ScaledStdConv2d"))
register("conv", *_timm(tl, "ScaledStdConv2dSame"))
register("pool", nn.MaxPool2d, nn.AvgPool2d, *_timm(pool2d_same, "MaxPool2dSame", "AvgPool2dSame"))
register("local", *_timm(tl, "BlurPool2d", "DropBlock2d"))
register(
    "global_reduction",
    nn.GroupNorm,
    nn.InstanceNorm2d,
    nn.Dropout2d,
    *_timm(tl, "GroupNorm", "GroupNorm1", "GroupNormAct"),
)
register("global_reduction", *_timm(tl, "GroupNorm1Act", "EvoNorm2dS0", "EvoNorm2dS0a", "EvoNorm2dS1", "EvoNorm2dS1a"))
register(
    "global_reduction", *_timm(tl, "EvoNorm2dS2", "EvoNorm2dS2a", "FilterResponseNormTlu2d", "FilterResponseNormAct2d")
)
register("response_norm", grn.GlobalResponseNorm)
register("global_reduction", *_timm(metaformer, "GroupNorm1NoBias"))
register("global_reduction", *_timm(tl, "SEModule", "EffectiveSEModule", "EcaModule", "CecaModule", "GlobalContext"))
register(
    "global_reduction",
    *_timm(cbam, "ChannelAttn", "LightChannelAttn"),
    *_timm(_efficientnet_blocks, "SqueezeExcite"),
)
register("global_reduction", *_timm(senet, "SEModule"), *_timm(hgnet, "EseModule"))
register("per_image", tl.DropPath)

BLOCKS: dict[type[nn.Module], type[blocks.Block]] = {
    tl.SplitAttn: blocks.SplitAttention,
    selective_kernel.SelectiveKernelAttn: blocks.KernelSelection,
    focalnet.FocalModulation: blocks.FocalModulation,
    _efficientnet_blocks.CondConvResidual: blocks.ConditionalResidual,
    tl.CondConv2d: blocks.ConditionalConv,
    convnext.ConvNeXtBlock: FusedConvNeXtBlock,
    **dict.fromkeys(_timm(hgnet, "StemV2"), blocks.PaddedStem),
    resnet.BasicBlock: residual_blocks.BasicBlock,
    resnet.Bottleneck: residual_blocks.Bottleneck,
}
ADAPTIVE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)

REFUSED = [
    (r"LSTM|GRU|^RNN|SSD$|Mamba(?!Out)", "recurrent: a cell depends on all cells before it"),
    (r"^(?!Positional).*Fourier|Dct|FFT|GlobalFilter", "Fourier: every output depends on the whole image"),
    (
        r"Attention|Attn|MHSA|SHSA|SHMA|XCA|MLA$|GPSA|LambdaLayer|Outlook|ParallelScalingBlock",
        "attention: every position depends on all others",
    ),
]
"""Layers of torch and timm that mix positions by their nature, by name, and why they are refused."""
TOKEN_MIXERS = tuple(_timm(mlp_mixer, "MixerBlock", "SpatialGatingBlock", "ResBlock"))  # too common to go by name


def layer_kind(module: nn.Module) -> str | None:
    """The kind of a layer, "block" for one of `BLOCKS`, or None for a container or an unknown module."""
    cls = type(module)
    if cls in BLOCKS:
        return "block"
    if isinstance(module, nn.Upsample):
        return "pointwise" if module.mode == "nearest" and _whole(module.scale_factor) else "local"
    if isinstance(module, ADAPTIVE):
        return "image_pool" if module.output_size in (1, (1, 1)) else None
    if isinstance(module, tl.GatherExcite):
        if module.gather is not None:
            return None  # strided convolutions and an upsampling by nearest: its layers do
        return "local" if module.extent else "global_reduction"
    return LAYER_KINDS.get(cls)


def _whole(factor: float | tuple[float, ...] | None) -> bool:
    return factor is not None and all(
        float(f).is_integer() for f in (factor if isinstance(factor, tuple) else (factor,))
    )


def refusal_reason(module: nn.Module) -> str | None:
    """Why a layer that mixes positions by its nature is refused, None for any other.

    Your own class is not judged by its name, but by its layers, and by the checks of what it computes (`verify`).
    """
    if layer_kind(module):
        return None
    if isinstance(module, TOKEN_MIXERS):
        return "token mixing: linear layers over all positions of an image"
    if type(module).__module__.partition(".")[0] not in ("torch", "timm"):
        return None
    return next((why for pattern, why in REFUSED if re.search(pattern, type(module).__name__)), None)
