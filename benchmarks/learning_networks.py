"""The networks of `learning.py`: the first levels of timm's, as small as its forms need, whole in themselves.

With patches of 8 px a network ends at stride 8. What lies beyond cannot be pre-trained, and begun anew under a
pre-trained beginning it would blur the comparison; so these end there, for both arms, with a linear layer on the
pooled 8 x 8 map. They are given to the commands as `learning_networks:small_resnet`, from this folder.
"""

from __future__ import annotations

from torch import nn

from spark_fast.networks import build_network

STAGES = 2  # strides 4 and 8


def small_resnet(**kwargs: object) -> nn.Module:
    """The first half of a ResNet-10 at half width behind a narrow stem of three layers: levels of 32 and 64."""
    sizes = {"layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256), "stem_type": "deep", "stem_width": 8}
    return build_network("resnet18", {**sizes, **kwargs}, STAGES)


def small_convnext(**kwargs: object) -> nn.Module:
    """The first half of a ConvNeXt smaller than Atto: levels of 16 and 64 channels, of one and two blocks."""
    sizes = {"depths": (1, 2, 1, 1), "dims": (16, 64, 128, 256)}
    return build_network("convnext_atto", {**sizes, **kwargs}, STAGES)


def small_convnext_grey(**kwargs: object) -> nn.Module:
    """`small_convnext` for images of one channel."""
    return small_convnext(in_chans=1, **kwargs)


def half_resnet18(**kwargs: object) -> nn.Module:
    """The first half of a ResNet-18: levels of 64 and 128 channels, of two blocks each."""
    return build_network("resnet18", dict(kwargs), STAGES)


def wide_resnet(**kwargs: object) -> nn.Module:
    """The first half of a ResNet-50: levels of 256 and 512 channels."""
    return build_network("resnet50", dict(kwargs), STAGES)


def wide_convnext(**kwargs: object) -> nn.Module:
    """The first half of a ConvNeXt-Tiny: levels of 96 and 192 channels."""
    return build_network("convnext_tiny", dict(kwargs), STAGES)
