"""Networks that timm and torchvision both have, and the names of their tensors there.

ResNets are the same to the letter. torchvision's ConvNeXts are one `features` list, stem and stages at odd places:

    timm                                   torchvision
    stem.{0,1}                             features.0.{0,1}
    stages.S.downsample.{0,1}              features.2S.{0,1}
    stages.S.blocks.B.conv_dw, .norm       features.2S+1.B.block.0, .2
    stages.S.blocks.B.mlp.fc1, .fc2        features.2S+1.B.block.3, .5
    stages.S.blocks.B.gamma (C,)           features.2S+1.B.layer_scale (C, 1, 1)
    head.norm, head.fc                     classifier.0, .2
"""

from __future__ import annotations

import re

import timm
import torchvision

LAYERS = {"conv_dw": "block.0", "norm": "block.2", "mlp.fc1": "block.3", "mlp.fc2": "block.5", "gamma": "layer_scale"}


def torchvision_names(network: str, keys: list[str]) -> dict[str, str]:
    """Names of `timm.create_model(network)` -> names of `torchvision.models.get_model(network)`.

    Raises:
        ValueError: torchvision has no such network; with those that both have.
    """
    if network not in shared_networks():
        raise ValueError(
            f"torchvision has no {network}; it shares these networks with timm: {', '.join(shared_networks())}. Any "
            f"network of timm can be exported with --to timm"
        )
    return {key: _convnext_name(key) if network.startswith("convnext") else key for key in keys}


def shared_networks() -> list[str]:
    """The ResNets and ConvNeXts that both have under one name."""
    models = torchvision.models
    families = (models.resnet.__name__, models.convnext.__name__)
    theirs = [n for n in models.list_models(module=models) if models.get_model_builder(n).__module__ in families]
    return sorted(set(theirs) & set(timm.list_models()))


def _convnext_name(key: str) -> str:
    if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(\w+?|mlp\.fc\d)(\.weight|\.bias|)", key):
        stage, block, layer, end = match.groups()
        return f"features.{2 * int(stage) + 1}.{block}.{LAYERS[layer]}{end}"
    if match := re.fullmatch(r"stages\.(\d+)\.downsample\.(.*)", key):
        return f"features.{2 * int(match[1])}.{match[2]}"
    for ours, theirs in (("stem.", "features.0."), ("head.norm.", "classifier.0."), ("head.fc.", "classifier.2.")):
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    raise ValueError(f"torchvision's ConvNeXts have no {key}")
