"""Layer-wise learning rates: the nearer to the input, the smaller (ELECTRA, BEiT), in the layers that SparK counts.

The published code counts a ResNet-50 as 7 layers and a ConvNeXt-S as 13 (downstream_imagenet/models/__init__.py), timm
as 18 and more, so the same decay would leave the stem a tenth of its rate. Other networks are counted as timm does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import ceil

from timm.models import ConvNeXt, ResNet
from timm.optim import param_groups_layer_decay
from torch import nn

LayerOf = Callable[[str], int]  # the layer of a parameter, by its name

RESNET_BLOCKS = {  # blocks of the second and third level -> how many of each are one layer
    (4, 6): (2, 3), (4, 23): (2, 3), (8, 36): (4, 4), (24, 36): (4, 4), (30, 48): (5, 6),
}  # fmt: skip


def parameter_groups(model: nn.Module, layer_decay: float) -> list[dict[str, object]]:
    """Groups for `set_rates`: each with its `lr_scale`, and with or without weight decay (1-d tensors).

    Args:
        layer_decay: a layer's rate as a share of the next one's; 1: all the same.
    """
    last, layer_of = _published_layers(model)
    if last == 0 or layer_decay == 1:
        groups = param_groups_layer_decay(model, weight_decay=1.0, layer_decay=layer_decay)
        return [{"params": g["params"], "lr_scale": g["lr_scale"], "decays": g["weight_decay"] > 0} for g in groups]
    found: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decays = parameter.dim() > 1 and not name.endswith(".bias")
        found.setdefault((layer_of(name), decays), []).append(parameter)
    return [
        {"params": params, "lr_scale": layer_decay ** (last - layer), "decays": decays}
        for (layer, decays), params in found.items()
    ]


def _published_layers(model: nn.Module) -> tuple[int, LayerOf]:
    """The number of the classifier's layer, and what gives a parameter's by its name; 0 where none is published."""
    if isinstance(model, ResNet):
        depths = (_blocks(model, "layer2"), _blocks(model, "layer3"))
        if depths in RESNET_BLOCKS:
            of_2, of_3 = RESNET_BLOCKS[depths]
            begin_3 = 2 + ceil(depths[0] / of_2)
            return _layers(begin_3 + ceil(depths[1] / of_3), of_2, begin_3, of_3, r"layer(\d)\.(\d+)\.", r"fc\.")
    if isinstance(model, ConvNeXt):
        last = 12 if _blocks(model, "stages.2.blocks") > 9 else 6
        return last + 1, lambda name: _convnext_layer(name, last)
    return 0, lambda name: 0


def _blocks(model: nn.Module, level: str) -> int:
    return len(list(model.get_submodule(level).children()))


def _layers(last: int, of_2: int, begin_3: int, of_3: int, block: str, head: str) -> tuple[int, LayerOf]:
    def layer_of(name: str) -> int:
        if re.match(head, name):
            return last + 1
        if (match := re.match(block, name)) is None:
            return 0
        level, number = int(match[1]), int(match[2])
        return {1: 1, 2: 2 + number // of_2, 3: begin_3 + number // of_3, 4: last}[level]

    return last + 1, layer_of


def _convnext_layer(name: str, last: int) -> int:
    if name.startswith("stem."):
        return 0
    match = re.match(r"stages\.(\d)\.(?:(downsample)|blocks\.(\d+))\.", name)
    if match is None:
        return last + 1
    level = int(match[1])
    if level == 3:
        return last
    if match[2] or level < 2:  # the downsampling before a level belongs to it
        return level + 1
    return 3 + int(match[3]) // 3
