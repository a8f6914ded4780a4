"""Turn a ConvNet into an encoder of visible patches: every layer by its kind, refused by name if it has none.

A layer is one of
    pointwise   it sees one cell at a time, or its statistics run over all cells: untouched
    conv, pool  it looks across the edge of a patch: takes its halo first
    local       it looks across in a way of its own (reflected borders): runs on the dense canvas
    mixer       it reduces over an image: reduces over the image's visible cells
    per image   it draws a random number per image
and a converted layer keeps its parameters, their names and its place, so the state dict is that of the network.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import timm.layers as tl
from timm.layers import activations as timm_activations
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.nn.modules import activation as torch_activations

from spark_fast.encoder.halo import Canvas, Current, HaloConv, HaloPool
from spark_fast.encoder.masked import MaskedLocal, MaskedMixer, MaskedNorm
from spark_fast.encoder.mixers import Mixer, PerImage


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


POINTWISE: set[type] = _activations() | {nn.Identity, nn.Dropout, nn.Linear, nn.LayerNorm}
POINTWISE |= {tl.LayerNorm, tl.LayerNorm2d, tl.LayerNormAct2d, tl.RmsNorm2d, tl.SimpleNorm2d}
BATCH_NORMS: set[type] = {nn.BatchNorm2d, nn.SyncBatchNorm, tl.BatchNormAct2d, tl.SyncBatchNormAct}
CONVS: set[type] = {nn.Conv2d}
POOLS: set[type] = {nn.MaxPool2d, nn.AvgPool2d}
LOCALS: set[type] = {tl.BlurPool2d}
MIXERS: set[type] = {nn.GroupNorm, tl.GroupNorm, tl.GroupNormAct, GlobalResponseNorm, tl.SEModule}
MIXERS |= {tl.EvoNorm2dS0, tl.FilterResponseNormTlu2d}
PER_IMAGE: set[type] = {tl.DropPath}

Table = list[tuple[set[type], type]]
PACKED: Table = [(CONVS, HaloConv), (POOLS, HaloPool), (LOCALS, Canvas), (MIXERS, Mixer), (PER_IMAGE, PerImage)]
MASKED: Table = [(CONVS | POOLS | LOCALS, MaskedLocal), (BATCH_NORMS, MaskedNorm), (MIXERS, MaskedMixer)]
KNOWN = POINTWISE | BATCH_NORMS | CONVS | POOLS | LOCALS | MIXERS | PER_IMAGE


def convert(network: nn.Module, table: Table, current: Current) -> nn.Module:
    """Convert every layer of `network`, in place, by a table of (types, mixin); returns the network.

    Raises:
        UnsupportedLayerError: a layer of unknown kind, by its path and type. The network is then unchanged.
    """
    check_layers(network)
    for path, module in list(_layers(network)):
        mixin = next((mixin for types, mixin in table if type(module) in types), None)
        if mixin is None:
            continue
        converted = _convert_layer(module, mixin, current)
        if not path:
            return converted
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, converted)
    return network


def check_layers(network: nn.Module) -> None:
    """Refuse a network that cannot be packed; it is not changed.

    Raises:
        UnsupportedLayerError: naming every kind of layer that cannot be, by path and type.
    """
    layers = _layers(network)
    unknown = [(path, m) for path, m in layers if type(m) not in KNOWN]
    if unknown:
        listed = ", ".join(f"{path or 'network'} ({type(m).__name__})" for path, m in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UnsupportedLayerError(f"cannot be packed: {listed}{more}. A layer must be of a kind listed in pack.py")
    for path, module in layers:
        _check_geometry(path, module)


def _layers(module: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """The layers of a network: modules of a known kind, whole, and whatever else has no children."""
    children = list(module.named_children())
    whole = type(module) in KNOWN or "Attention" in type(module).__name__  # attention mixes in its own forward
    if whole or not children:
        return [(path, module)]
    return [found for name, child in children for found in _layers(child, f"{path}.{name}" if path else name)]


def _check_geometry(path: str, module: nn.Module) -> None:
    """Refuse what the halo arithmetic does not cover, by name."""
    if type(module) not in CONVS | POOLS:
        return
    reasons = []
    if getattr(module, "padding_mode", "zeros") != "zeros":
        reasons.append(f"padding_mode={module.padding_mode!r}")
    if isinstance(getattr(module, "padding", 0), str):
        reasons.append(f"padding={module.padding!r}")
    for name in ("kernel_size", "stride", "padding", "dilation"):
        value = getattr(module, name, 1)
        if isinstance(value, tuple) and len(set(value)) > 1:
            reasons.append(f"{name}={value} (not square)")
    if isinstance(module, nn.AvgPool2d) and not module.count_include_pad and module.padding not in (0, (0, 0)):
        reasons.append("count_include_pad=False with padding")
    if getattr(module, "return_indices", False):
        reasons.append("return_indices=True")
    if reasons:
        raise UnsupportedLayerError(f"cannot be packed: {path} ({type(module).__name__}) has {', '.join(reasons)}")


def _convert_layer(module: nn.Module, mixin: type, current: Current) -> nn.Module:
    """The same layer, parameters shared, as an object of class (mixin, its own class)."""
    cls: Any = _converted_class(mixin, type(module))  # type: ignore[arg-type]
    converted: nn.Module = cls.__new__(cls)
    converted.__dict__.update(module.__dict__)
    converted.current = current  # type: ignore[assignment]
    return converted


@cache
def _converted_class(mixin: Any, base: Any) -> Any:
    """Made on demand, as torch.nn.utils.parametrize does, so that each kind is written once for all types."""
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})
