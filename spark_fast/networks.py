"""Networks by name: any ConvNet of timm, or your own as `package.module:function`."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import FeatureInfo
from torch import nn

from spark_fast.encoder.pyramid import MIN_STRIDE
from spark_fast.errors import SettingsError

# the short names of the published script
PUBLISHED_MODELS = {
    "res50": "resnet50",
    "res101": "resnet101",
    "res152": "resnet152",
    "res200": "resnet200",
    "cnxS": "convnext_small",
    "cnxB": "convnext_base",
    "cnxL": "convnext_large",
}


def parse_input_size(text: str) -> tuple[int, int]:
    """(H, W) in pixels of "N" or "HxW". Raises SettingsError for anything else."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(size) == 0:
        raise SettingsError(f"--input_size must be N or HxW in pixels, got {text!r}")
    return size


def build_network(model: str, kwargs: dict | None = None, stages: int | None = None, in_chans: int = 3) -> nn.Module:
    """Build the network that `model` names; it returns a list of feature maps.

    Args:
        model: a timm name, or `package.module:function`, a function that returns an nn.Module.
        kwargs: for `timm.create_model` or the function.
        stages: of a timm network, only the part that makes the first so many levels from stride 4 upwards.
        in_chans: channels of the images, of a timm network; a function of yours decides by itself.

    Raises:
        ValueError: an unknown name (the nearest are given), a function that cannot be imported or returns no module,
            or more stages than the network has.
    """
    if model.startswith(("hf-hub:", "local-dir:")):
        raise ValueError(
            f"{model!r} names weights, not a network: give the network's name in timm as --model, and weights of the "
            f"Hub as --init_weight (of an evaluation: --weights)"
        )
    if ":" in model:
        return _own(model, kwargs or {})
    if not timm.is_model(model):
        near = get_close_matches(model, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else "; see timm.list_models()"
        raise ValueError(f"unknown model {model!r}{hint}, or give your own as package.module:function")
    kwargs = {**(kwargs or {}), **timm_channels(in_chans)}
    if stages is None:
        return _features(model, kwargs)
    levels = _levels(model, kwargs)
    if not 1 <= stages <= len(levels):
        raise ValueError(f"stages must be from 1 to {len(levels)}, the levels of {model}, got {stages}")
    network = _features(model, {**kwargs, "out_indices": levels[:stages]})
    wanted = getattr(network, "_stage_out_idx", None)  # timm's EfficientNets build all their stages in any case
    if wanted is not None:
        blocks = network.get_submodule("blocks")
        assert isinstance(blocks, nn.Sequential)
        network.blocks = blocks[: max(wanted)]
    return network


def count_levels(model: str) -> int:
    """Levels of a timm network from stride 4 upwards; 0 where that is not known: your own, or one without maps."""
    try:
        return len(_levels(model, {})) if timm.is_model(model) else 0
    except ValueError:
        return 0


def timm_channels(in_chans: int) -> dict[str, Any]:
    """The `in_chans` argument of `timm.create_model`; none for three, which every network takes."""
    return {} if in_chans == 3 else {"in_chans": in_chans}


def takes_drop_path(model: str) -> bool:
    """Whether a network may be given a `drop_path_rate`: your own by its function's signature, timm's are all tried.

    Raises:
        SettingsError: a function that cannot be imported.
    """
    try:
        return ":" not in model or _takes(_function(model), "drop_path_rate")
    except ValueError as error:
        raise SettingsError(str(error)) from error


def import_from_current_folder(model: str) -> None:
    """Have a model `package.module:function` looked for in the current folder first, as `python -m` does.

    For commands alone: it changes sys.path, which is a Python caller's own.
    """
    here = str(Path.cwd())
    if ":" in model and here not in sys.path:
        sys.path.insert(0, here)


def _levels(model: str, kwargs: dict) -> list[int]:
    """The indices of the feature maps from stride 4 upwards."""
    with torch.device("meta"):
        info = _features(model, kwargs).feature_info
    assert isinstance(info, FeatureInfo)
    return [i for i, stride in zip(info.out_indices, info.reduction(), strict=True) if stride >= MIN_STRIDE]


def _features(name: str, kwargs: dict) -> nn.Module:
    try:
        return timm.create_model(name, features_only=True, **kwargs)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        raise ValueError(f"timm cannot build {name} as a network of feature maps: {error}") from error


def _function(target: str) -> Callable[..., object]:
    module_name, _, function_name = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model {target!r} cannot be imported: {error}") from error


def _takes(function: Callable[..., object], name: str) -> bool:
    """Whether a function has a parameter of this name, or takes any."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a builtin: it is called, and says so itself
        return True
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _own(target: str, kwargs: dict) -> nn.Module:
    function = _function(target)
    if "drop_path_rate" in kwargs and not _takes(function, "drop_path_rate"):
        raise ValueError(f"model {target!r} takes no drop_path_rate: give --drop_path 0, or the function this argument")
    try:
        network = function(**kwargs)
    except TypeError as error:
        raise ValueError(f"model {target!r} cannot be built: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"model {target!r} returned a {type(network).__name__}, not an nn.Module")
    return network
