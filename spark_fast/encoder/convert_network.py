"""Turn a ConvNet into an encoder of visible patches: every layer by its kind, refused by name if it has none.

A converted layer keeps its parameters, their names and its place, so the state dict is that of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

from torch import nn

from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.conv.geometry import axes
from spark_fast.encoder.layer_registry import BLOCKS, PADS, UnsupportedLayerError, kind, reason
from spark_fast.encoder.layers.halo import DenseFallback, FoldedPadding, HaloConv, HaloPool
from spark_fast.encoder.layers.masked import MaskedGlobalReduction, MaskedLocal, MaskedNorm
from spark_fast.encoder.layers.per_image import GlobalReduction, ImagePool, PerImage

Table = dict[str, type]
Sides = tuple[int, int, int, int]
UNKNOWN = "of no known kind (see spark_fast.encoder.register)"
PACKED: Table = {
    "conv": HaloConv,
    "pool": HaloPool,
    "local": DenseFallback,
    "global_reduction": GlobalReduction,
    "image_pool": ImagePool,
    "per_image": PerImage,
    "pad": FoldedPadding,
}
MASKED: Table = {
    "norm": MaskedNorm,
    **dict.fromkeys(("conv", "pool", "local"), MaskedLocal),
    "global_reduction": MaskedGlobalReduction,
    "image_pool": ImagePool,
    "pad": FoldedPadding,
}


def convert_layers(network: nn.Module, table: Table, context: EncoderContext) -> tuple[nn.Module, Callable[[], None]]:
    """Convert every layer of `network`, in place, by a table of kind -> mixin.

    Returns:
        the network, and a function that puts the old layers back.

    Raises:
        UnsupportedLayerError: a layer that cannot be packed, by its path and type. The network is then unchanged.
    """
    check_layers(network)
    pads, folded_padding = _padding(network)
    made: dict[int, nn.Module] = {}  # a layer used in two places stays one
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for path, module in list(_layers(network)):
        found = "pad" if id(module) in pads else kind(module)
        mixin = BLOCKS[type(module)] if found == "block" else table.get(found or "")
        if mixin is None:
            continue
        converted = made.setdefault(id(module), _convert_layer(module, mixin, context, path))
        if not path:
            network = converted
            continue
        parent, _, name = path.rpartition(".")
        replaced.append((network.get_submodule(parent), name, module))
        setattr(network.get_submodule(parent), name, converted)
    for layer, (sides, value) in folded_padding.items():
        made[layer].folded_padding, made[layer].fill = sides, value  # type: ignore[assignment]

    def undo() -> None:
        for parent, name, module in reversed(replaced):
            setattr(parent, name, module)

    return network, undo


def check_layers(network: nn.Module) -> None:
    """Refuse a network that cannot be packed; it is not changed.

    Raises:
        UnsupportedLayerError: naming every kind of layer that cannot be, by path and type.
    """
    pads, folded_padding = _padding(network)
    refused: dict[tuple[str, str], list[str]] = {}
    for path, module in _layers(network):
        why = reason(module)
        if why is None and id(module) not in pads and kind(module) is None:
            why = _unknown(module)
        elif kind(module) in ("conv", "pool"):
            why = _misfit(module, *folded_padding.get(id(module), ((0, 0, 0, 0), 0.0)))
        if why:
            refused.setdefault((type(module).__name__, why), []).append(path or "network")
    if refused:
        listed = [
            f"{paths[0]} ({name}): {why}" + (f", and {len(paths) - 1} more of them" if paths[1:] else "")
            for (name, why), paths in sorted(refused.items(), key=lambda item: item[0][1] == UNKNOWN)
        ]
        raise UnsupportedLayerError(f"cannot be packed: {'; '.join(listed)}")


def _layers(module: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """The layers of a network: modules of a known kind, whole, and whatever else has no children."""
    children = list(module.named_children())
    found, blocks = [], kind(module) == "block"
    if blocks:
        inside = BLOCKS[type(module)].inside  # type: ignore[attr-defined]
        found, children = [(path, module)], [(name, child) for name, child in children if name not in inside]
    elif kind(module) or reason(module) or not children:
        return [(path, module)]
    for name, child in children:
        found += _layers(child, f"{path}.{name}" if path else name)
    return found


def _unknown(module: nn.Module) -> str | None:
    if isinstance(module, PADS):
        return "padding not followed by a convolution or pooling"
    if hasattr(module, "where"):
        return "packed already"
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # without children, or they were no layer
    return None if isinstance(module, containers) else UNKNOWN


def _padding(network: nn.Module) -> tuple[set[int], dict[int, tuple[Sides, float]]]:
    """Padding that the layer after it takes over.

    Returns:
        the padding layers followed by a convolution or pooling, by id; and what each such layer takes over, by id:
        (left, right, top, bottom) and the value it holds.
    """
    pads, folded_padding = set(), {}
    for parent in network.modules():
        if kind(parent) == "block":
            inside: dict[str, Sides] = BLOCKS[type(parent)].padded  # type: ignore[attr-defined]
            folded_padding.update({id(parent.get_submodule(n)): (sides, 0.0) for n, sides in inside.items()})
        for pad, layer in pairwise(parent.children()):
            if isinstance(pad, PADS) and kind(layer) in ("conv", "pool") and min(_sides(pad)) >= 0:
                pads.add(id(pad))
                folded_padding[id(layer)] = (_sides(pad), float(getattr(pad, "value", 0.0)))
    return pads, folded_padding


def _sides(pad: nn.Module) -> Sides:
    value: Any = pad.padding
    return (value,) * 4 if isinstance(value, int) else tuple(value)


def _misfit(module: Any, sides: Sides, value: float) -> str | None:
    """Why a convolution or pooling, with the padding it takes over, cannot be packed; None if it can."""
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    if getattr(module, "return_indices", False):
        return "return_indices=True"
    if value and kind(module) == "conv":
        return f"it is padded with {value}, where only zero is nothing to a convolution"
    y, x = axes(module, sides)
    if y.stride != x.stride:
        return f"stride={module.stride} is not square"
    if not all(a.aligned(getattr(module, "ceil_mode", False)) for a in (y, x)):
        return (
            f"kernel {y.kernel}x{x.kernel}, stride {y.stride}, padding {y.lo} and {x.lo} do not turn a map into one "
            f"{y.stride} times smaller, so patches do not stay aligned"
        )
    return None


def _convert_layer(module: nn.Module, mixin: type, context: EncoderContext, path: str) -> nn.Module:
    """The same layer, parameters shared, as an object of class (mixin, its own class)."""
    cls: Any = _converted_class(mixin, type(module))  # type: ignore[arg-type]
    converted: nn.Module = cls.__new__(cls)
    converted.__dict__.update(module.__dict__)
    converted.context, converted.where = context, path or "the layer"  # type: ignore[assignment]
    return converted


@cache
def _converted_class(mixin: Any, base: Any) -> Any:
    """Made on demand, as torch.nn.utils.parametrize does, so that each kind is written once for all types."""
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})
