"""To which network a file of weights belongs: by what the file says, or else by the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from torch import Tensor

from spark_fast.networks import PUBLISHED_MODELS, build_network
from spark_fast.weights.named_tensors import COUNTER, Shapes, State, channels_of, holds, places_of, which_of
from spark_fast.weights.spark_keys import ENCODER, network_name

# the networks that were published pre-trained, and their small relatives
RECOGNISED = (
    *("resnet18", "resnet34", "convnext_tiny", *PUBLISHED_MODELS.values()),
    *(f"convnextv2_{size}" for size in ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")),
)
# networks that weights which fit no model are compared with too, to say what they are
LOOKALIKES = (
    *("resnet10t", "resnet14t", "resnet26", "resnet50d", "resnext50_32x4d", "wide_resnet50_2", "seresnet50"),
    *("resnetv2_50", "convnext_atto", "convnext_femto", "convnext_pico", "convnext_nano", "convnext_xlarge"),
    *("efficientnet_b0", "efficientnet_b3", "mobilenetv2_100", "mobilenetv3_large_100", "regnety_016", "regnety_040"),
    *("densenet121", "vgg16", "vit_small_patch16_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224"),
)
FEWEST = 20  # tensors; each of these networks has more


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
        name = _full_name(metadata_of(path).get("architecture", ""))
    return name if ":" in name or timm.is_model(name) else ""


def metadata_of(path: Path) -> dict[str, str]:
    """What a file of safetensors says of its tensors; {} for any other file."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def recognise(state: Mapping[str, Tensor]) -> str:
    """The network in RECOGNISED to which these tensors belong; "" for none.

    It is the largest whose tensors are all there: the layers of resnet50 are also in resnet101.

    Args:
        state: tensors of any shape, under canonical names or those of the plain network.
    """
    tensors = {ENCODER + network_name(name.removeprefix(ENCODER)): value for name, value in state.items()}
    return next((name for name in _largest_first() if holds(tensors, _shapes(name))), "")


def recognise_beneath(tensors: Mapping[str, Tensor]) -> str:
    """As `recognise`, for a network anywhere in a file.

    Args:
        tensors: all of the file, of any shape, see `named_tensors.flatten`.

    Raises:
        ValueError: it is there several times; the message has the places.
    """
    for name in _largest_first() if tensors else ():
        places = places_of(_shapes(name), tensors)
        if len(places) > 1:
            raise ValueError(which_of(place.prefix for place in places))
        if places:
            return name
    return ""


def lookalike(state: State, tensors: Mapping[str, Tensor], named: str) -> str:
    """The network of timm to which these weights belong, of the few dozen compared; "" for none of them.

    Args:
        state: the tensors in the usual places of the file.
        tensors: all of the file, of any shape, see `named_tensors.flatten`.
        named: the network that the file names; it is compared first.
    """
    if max(len(state.tensors), len(tensors)) < FEWEST:
        return ""
    for names in ((named, *RECOGNISED), LOOKALIKES):  # the latter take seconds to build, if only on the meta device
        known = [name for name in names if timm.is_model(name)]
        found = [name for name in known if holds(state.tensors, _whole(name)) or places_of(_whole(name), tensors)]
        if found:
            return max(found, key=lambda name: len(_whole(name)))
    return ""


def image_channels(network: str, state: State, tensors: Mapping[str, Tensor]) -> int:
    """The channels of the images that weights of this network are for.

    They are those of its first kernel, (O, C, ky, kx); 3 for a network of your own, or where the tensors do not tell.

    Args:
        state, tensors: as for `lookalike`.
    """
    if not timm.is_model(network):
        return 3
    shapes = _shapes(network)
    for place in (state.tensors, *(place.tensors for place in places_of(shapes, tensors))):
        if len(found := channels_of(place, shapes)) == 1:
            return found.pop()[0]
    return 3


def _largest_first() -> list[str]:
    return sorted(RECOGNISED, key=lambda name: -len(_shapes(name)))


def _full_name(name: object) -> str:
    """The name without the published script's abbreviations."""
    return PUBLISHED_MODELS.get(str(name), str(name))


@cache
def _shapes(network: str) -> Shapes:
    """Of the network of feature maps."""
    with torch.device("meta"):
        return _canonical(build_network(network).state_dict())


@cache
def _whole(network: str) -> Shapes:
    """Of the network without classifier and norm before it, which a file need not have. timm's list may have others."""
    with torch.device("meta"):
        state = timm.create_model(network, num_classes=0).state_dict()
    return _canonical(
        {k: v for k, v in state.items() if not k.startswith(("head.", "norm.", "fc_norm.", "final_conv."))}
    )


def _canonical(state: Mapping[str, Tensor]) -> Shapes:
    return {ENCODER + network_name(k): v.shape for k, v in state.items() if not k.endswith(COUNTER)}
