"""Convert the layers of a ConvNet, in place, each by its kind; a layer of no known kind is refused by name.

A converted layer keeps its parameters, their names and its place, so the state dict is that of the network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

from timm.models._features import FeatureDictNet, FeatureListNet
from timm.models.convnext import ConvNeXtBlock
from torch import nn

from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.conv.geometry import layer_axes
from spark_fast.encoder.layer_registry import BLOCKS, UnsupportedLayerError, layer_kind, refusal_reason
from spark_fast.encoder.layers.batch_norm import ACTIVATIONS, Activated, PackedBatchNorm
from spark_fast.encoder.layers.converted import ConvertedLayer, FoldedPadding, PaddedLayer, new_layer
from spark_fast.encoder.layers.halo import DenseFallback, HaloConv, HaloPool
from spark_fast.encoder.layers.layer_norm import ChannelNorm
from spark_fast.encoder.layers.masked import MaskedGlobalReduction, MaskedLocal, MaskedNorm
from spark_fast.encoder.layers.per_image import GlobalReduction, ImagePool, PerImage
from spark_fast.encoder.layers.response_norm import ResponseNorm
from spark_fast.encoder.layers.synced_batch_norm import SyncedBatchNorm2d

LayerTable = dict[str, type[ConvertedLayer]]
Sides = tuple[int, int, int, int]
PACKED_ALREADY = "packed already"
UNKNOWN = "of unknown kind (see spark_fast.encoder.register)"
IN_ORDER = (nn.Sequential, FeatureDictNet, FeatureListNet)  # their forward runs their children one after another
PACKED: LayerTable = {
    "layer_norm": ChannelNorm,
    "norm": PackedBatchNorm,
    "activation": Activated,
    "conv": HaloConv,
    "pool": HaloPool,
    "local": DenseFallback,
    "global_reduction": GlobalReduction,
    "response_norm": ResponseNorm,
    "image_pool": ImagePool,
    "per_image": PerImage,
    "pad": FoldedPadding,
}
MASKED: LayerTable = {
    "norm": MaskedNorm,
    **dict.fromkeys(("conv", "pool", "local"), MaskedLocal),
    **dict.fromkeys(("global_reduction", "response_norm"), MaskedGlobalReduction),
    "image_pool": ImagePool,
    "pad": FoldedPadding,
}


def convert_layers(
    network: nn.Module, table: LayerTable, context: EncoderContext
) -> tuple[nn.Module, Callable[[], None]]:
    """Convert every layer of `network`, in place, by a table of kind -> mixin.

    The kinds that the table lacks stay as they are.

    Returns:
        the network, and a function that puts the old layers back.

    Raises:
        UnsupportedLayerError: a layer that cannot be packed, by its path and type. The network is then unchanged.
    """
    check_layers(network)
    (pads, folded_padding), rounded = _padding(network), _before_products(network)
    activations, followed = _activations(network)
    made: dict[int, ConvertedLayer] = {}  # a layer used in two places stays one
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for path, module in list(_layers(network)):
        kind = "pad" if id(module) in pads else "activation" if id(module) in activations else layer_kind(module)
        mixin = BLOCKS[type(module)] if kind == "block" else table.get(kind or "")
        if mixin is None:
            continue
        converted = made.setdefault(id(module), _convert_layer(module, mixin, context, path))
        if not path:
            network = converted
            continue
        parent, _, name = path.rpartition(".")
        replaced.append((network.get_submodule(parent), name, module))
        setattr(network.get_submodule(parent), name, converted)
    for number, (sides, value) in folded_padding.items():
        layer = made[number]
        assert isinstance(layer, PaddedLayer)
        layer.folded_padding, layer.fill = sides, value
    for number in rounded & made.keys():
        norm = made[number]
        if isinstance(norm, ChannelNorm):
            norm.rounded = True
    for number in followed.keys() & made.keys():
        norm = made[number]
        if isinstance(norm, PackedBatchNorm):
            norm.followed_by = followed[number]

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
        why = refusal_reason(module)
        if why is None and id(module) not in pads and layer_kind(module) is None:
            why = _unknown(module)
        elif layer_kind(module) in ("conv", "pool"):
            why = _misfit(module, *folded_padding.get(id(module), ((0, 0, 0, 0), 0.0)))
        if why:
            refused.setdefault((type(module).__name__, why), []).append(path or "network")
    if refused:
        listed = [
            f"{paths[0]} ({name}): {why}" + (f", and {len(paths) - 1} more of them" if paths[1:] else "")
            for (name, why), paths in sorted(refused.items(), key=lambda item: item[0][1] == UNKNOWN)
        ]
        if all(why == PACKED_ALREADY for _, why in refused):
            raise UnsupportedLayerError("the network is in an encoder already: build a new one")
        raise UnsupportedLayerError(f"cannot be packed: {'; '.join(listed)}")


def _layers(module: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """The layers of a network: modules of a known kind, whole, and whatever else has no children."""
    children, found = _children(module), []
    if layer_kind(module) == "block":
        inside = BLOCKS[type(module)].inside
        found, children = [(path, module)], [(name, child) for name, child in children if name not in inside]
    elif layer_kind(module) or refusal_reason(module) or not children:
        return [(path, module)]
    for name, child in children:
        found += _layers(child, f"{path}.{name}" if path else name)
    return found


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """As `named_children`, but a module that stands in two places comes twice."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _unknown(module: nn.Module) -> str | None:
    """Why a module of no kind is refused, None for a container."""
    if isinstance(module, nn.ConstantPad2d):
        return "padding not followed by a convolution or pooling"
    if isinstance(module, ConvertedLayer):
        return PACKED_ALREADY
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # without children, or they were no layer
    return None if isinstance(module, containers) else UNKNOWN


def _padding(network: nn.Module) -> tuple[set[int], dict[int, tuple[Sides, float]]]:
    """Padding that the layer after it takes over.

    Returns:
        the padding layers followed by a convolution or pooling wherever they stand, by id; and what each such layer
        takes over, by id: (left, right, top, bottom) and the value it holds.
    """
    pads, loose, folded_padding = set(), set(), {}
    for parent in network.modules():
        if layer_kind(parent) == "block":
            padded = BLOCKS[type(parent)].padded
            folded_padding.update({id(parent.get_submodule(n)): (sides, 0.0) for n, sides in padded.items()})
        for pad, layer in pairwise([*(child for _, child in _children(parent)), None]):
            if not isinstance(pad, nn.ConstantPad2d):  # ZeroPad2d is one
                continue
            if layer is not None and layer_kind(layer) in ("conv", "pool") and min(pad.padding) >= 0:
                pads.add(id(pad))
                folded_padding[id(layer)] = (pad.padding, float(pad.value))
            else:
                loose.add(id(pad))
    return pads - loose, folded_padding


def _before_products(network: nn.Module) -> set[int]:
    """Norms whose output only a convolution or linear layer reads, by id: in an nn.Sequential, and timm's ConvNeXt."""
    found = set()
    for parent in network.modules():
        pairs = pairwise(parent) if type(parent) is nn.Sequential else ()
        found |= {id(norm) for norm, layer in pairs if isinstance(layer, (nn.Conv2d, nn.Linear))}
        if isinstance(parent, ConvNeXtBlock):
            found.add(id(parent.norm))
    return found


def _activations(network: nn.Module) -> tuple[set[int], dict[int, str]]:
    """Activations that the batch norm before them can compute, in containers that run their children in order.

    Returns:
        these activations, by id; and the norms, by id: the activation by its name in `ACTIVATIONS`.
    """
    places = Counter(id(child) for parent in network.modules() for _, child in _children(parent))
    found, followed = set(), {}
    for parent in network.modules():
        if type(parent) not in IN_ORDER:
            continue
        for (name, norm), (_, activation) in pairwise(_children(parent)):
            shown = name in getattr(parent, "return_layers", ()) or places[id(norm)] > 1
            if type(norm) in (nn.BatchNorm2d, SyncedBatchNorm2d) and ACTIVATIONS.get(type(activation)) and not shown:
                found.add(id(activation))
                followed[id(norm)] = ACTIVATIONS[type(activation)]
    return found, followed


def _misfit(module: nn.Module, sides: Sides, value: float) -> str | None:
    """Why a convolution or pooling, with the padding it takes over, cannot be packed; None if it can."""
    mode = getattr(module, "padding_mode", "zeros")
    if mode != "zeros":
        return f"padding_mode={mode!r}"
    if getattr(module, "return_indices", False):
        return "return_indices=True"
    if value and layer_kind(module) == "conv":
        return f"it is padded with {value}, and a convolution can be packed only with zero padding"
    y, x = layer_axes(module, sides)
    if y.stride != x.stride:
        return f"stride={(y.stride, x.stride)} is not square"
    if not all(a.aligned(getattr(module, "ceil_mode", False)) for a in (y, x)):
        return (
            f"kernel {y.kernel}x{x.kernel}, stride {y.stride}, padding {y.lo} and {x.lo} do not turn a map into one "
            f"{y.stride} times smaller, so patches do not stay aligned"
        )
    return None


def _convert_layer(
    module: nn.Module, mixin: type[ConvertedLayer], context: EncoderContext, path: str
) -> ConvertedLayer:
    """The same layer, parameters shared, as an object of class (mixin, its own class)."""
    converted = new_layer(mixin, type(module))
    converted.__dict__.update(module.__dict__)
    converted.context, converted.layer_path = context, path or "the layer"
    return converted
