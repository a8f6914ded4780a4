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
    """The first half of a ResNet-18 at half its width: levels of 32 and 64 channels."""
    widths = {"channels": (32, 64, 128, 256), "stem_width": 32}
    return build_network("resnet18", {**widths, **kwargs}, STAGES)


def small_convnext(**kwargs: object) -> nn.Module:
    """The first half of a ConvNeXt-Atto, its second level twice as deep: levels of 40 and 80 channels."""
    return build_network("convnext_atto", {"depths": (2, 4, 6, 2), **kwargs}, STAGES)


def wide_resnet(**kwargs: object) -> nn.Module:
    """The first half of a ResNet-50: levels of 256 and 512 channels."""
    return build_network("resnet50", dict(kwargs), STAGES)


def wide_convnext(**kwargs: object) -> nn.Module:
    """The first half of a ConvNeXt-Tiny: levels of 96 and 192 channels."""
    return build_network("convnext_tiny", dict(kwargs), STAGES)
