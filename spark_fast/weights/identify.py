"""Which network a file of weights is of: as it says itself, or else by the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from torch import Tensor

from spark_fast.networks import PUBLISHED_MODELS, build_network
from spark_fast.weights.spark_keys import ENCODER, network_name

# the networks that were published pre-trained, and their small relatives
RECOGNISED = ("resnet18", "resnet34", "convnext_tiny", *PUBLISHED_MODELS.values())


def named_network(path: Path, content: Mapping[str, object], settings: Mapping[str, object]) -> str:
    """The network that a file names, "" where it names none.

    Our checkpoints have it in their settings, those of the published code as "arch", an exported encoder in the
    metadata of safetensors. The latter two count where timm has such a network, or for `package.module:function`.
    """
    model = settings.get("model")
    if isinstance(model, Mapping):
        return _full_name(model.get("model", ""))
    name = _full_name(content.get("arch", ""))
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            name = _full_name((file.metadata() or {}).get("architecture", ""))
    return name if ":" in name or timm.is_model(name) else ""


def recognise(state: Mapping[str, Tensor]) -> str:
    """Which of the networks in RECOGNISED these tensors are of; "" for none.

    The largest one whose every tensor is there: the layers of resnet50 are also in resnet101.

    Args:
        state: under canonical names, or those of the plain network.
    """
    shapes = {network_name(name.removeprefix(ENCODER)): tuple(value.shape) for name, value in state.items()}
    sizes = {name: len(wanted) for name in RECOGNISED if (wanted := _shapes(name)).items() <= shapes.items()}
    return max(sizes, key=sizes.__getitem__, default="")


def _full_name(name: object) -> str:
    """The name without the published script's abbreviations."""
    return PUBLISHED_MODELS.get(str(name), str(name))


@cache
def _shapes(network: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {network_name(k): tuple(v.shape) for k, v in build_network(network).state_dict().items()}
