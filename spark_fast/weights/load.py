"""Weights into a model: whole or not at all, with a message that names what does not fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from spark_fast.checkpoint.state_dict import MISFIT, load_strictly
from spark_fast.errors import MisfitError
from spark_fast.method import Method
from spark_fast.weights.named_tensors import (
    COUNTER,
    Shapes,
    State,
    channels_of,
    holds,
    matches,
    other_channels,
    read_state,
    same_shape,
)
from spark_fast.weights.read import Weights, read_weights
from spark_fast.weights.spark_keys import ENCODER, canonical_name, network_name

OURS = "encoder.network."  # our names of the encoder's tensors begin so

log = logging.getLogger("spark_fast")


def load_weights(path: Path, model: Method) -> None:
    """Read weights (see `read_weights`) and load them into a model from `build_spark`, as `load_into_spark`."""
    load_into_spark(read_weights(path), model)


def load_into_spark(weights: Weights, model: Method) -> None:
    """Load a model from `build_spark`: the whole of it, or its encoder where the weights are of a plain network.

    Where the weights take three channels and the model another number, the encoder's first layer is adapted as timm
    does it, and the decoder keeps its initial values. What a plain network has beyond the encoder (timm's classifier)
    is ignored. The log says so, how many tensors of encoder and decoder were loaded, and whether the decoder is new.

    Raises:
        MisfitError: a tensor is missing, unknown, of another shape or not finite, by name, or several models in the
            file fit. The model is then unchanged.
    """
    own, left = model.state_dict(), None
    encoder = {canonical_name(name): value.shape for name, value in own.items() if name.startswith(OURS)}
    state = weights.state if weights.state.has_decoder else weights.holding(encoder)
    try:
        if state.has_decoder and not channels_of(state.tensors, encoder):
            loaded = _load_whole(state, model)
        else:  # a decoder predicts the channels that it was trained with
            loaded, left = _load_encoder(state, model)
    except ValueError as error:
        raise _misfit(weights, state, encoder, error, len(model.encoder.channels)) from None
    of_encoder = sum(name.startswith(OURS) for name in loaded)
    uncounted = sum(name.startswith(OURS) and name.endswith(COUNTER) and name not in loaded for name in own)
    counts = (of_encoder, len(encoder) - uncounted, len(loaded) - of_encoder, len(own) - len(encoder))
    log.info("%s: %d of the encoder's %d tensors loaded, %d of the decoder's %d", weights.path, *counts)
    if left is not None:
        shown = ", ".join(left[:5]) or "nothing"
        log.info("%s: loaded the encoder; the decoder keeps its initial values; ignored: %s", weights.path, shown)


def load_spark_state_dict(model: Method, state: Mapping) -> None:
    """Load a checkpoint of the published code into a model from `build_spark`.

    Args:
        state: the state dict itself, or the whole checkpoint (see `tensors_of`); ResNets in timm's names, ConvNeXts
            in the official ones. The three deprecated buffers and "config" are ignored.

    Raises:
        ValueError: tensors missing, unknown, or of another shape, by name. The model is then unchanged.
    """
    _load_whole(read_state(state), model)


def load_into_network(weights: Weights, network: nn.Module, new: set[str], in_chans: int = 3) -> None:
    """Load a plain network. Tensors in `new` keep their initial values where they are missing or have another shape.

    Args:
        new: their names: a classifier, levels that were not pre-trained.
        in_chans: channels of the network's images; a first layer of three is adapted to others, as timm does it.

    Raises:
        MisfitError: a tensor is missing, of another shape or not finite, by name, or several networks in the file
            fit. The network is then unchanged.
    """
    own = network.state_dict()
    canonical = {name: ENCODER + network_name(name) for name in own}
    wanted = {canonical[name]: value.shape for name, value in own.items() if name not in new}
    tensors = (state := weights.holding(wanted)).tensors
    found = _found(canonical, tensors)
    kept = {n: tensors[k] for n, k in found.items() if n not in new or same_shape(tensors[k].shape, own[n].shape)}
    fresh = sorted(new - set(kept))
    try:
        _load(network, {name: own[name] for name in fresh} | kept, in_chans=in_chans)
    except ValueError as error:
        raise _misfit(weights, state, wanted, error) from None
    anew = ", ".join(fresh[:5]) + (f" and {len(fresh) - 5} more" if len(fresh) > 5 else "")
    total = sum(name in kept or name in fresh or not name.endswith(COUNTER) for name in own)
    counts = (len(kept), total)
    log.info("%s: %d of %d tensors loaded; these keep their initial values: %s", weights.path, *counts, anew or "none")


def _load_whole(state: State, model: Method) -> list[str]:
    """Load all; returns the names in the model of what the file has."""
    found = _found({name: canonical_name(name) for name in model.state_dict()}, state.tensors)
    unknown = _file_names(state, set(found.values()))
    _load(model, {name: state.tensors[key] for name, key in found.items()}, unknown)
    return list(found)


def _load_encoder(state: State, model: Method) -> tuple[list[str], list[str]]:
    """Load the encoder; returns the names in the model of what the file has, and its names of what is left out."""
    own = model.state_dict()
    encoder = {name: canonical_name(name) for name in own if name.startswith(OURS)}
    found = _found(encoder, state.tensors)
    left = sorted(_file_names(state, set(found.values())))
    kept = {name: value for name, value in own.items() if name not in encoder}
    whole = all(name in found or name.endswith(COUNTER) for name in encoder)
    strangers = [name for key, name in state.names.items() if key.startswith(ENCODER) and key not in found.values()]
    misfit = (strangers if state.has_decoder else []) if whole else left  # of another network, then: they tell which
    _load(model, kept | {name: state.tensors[key] for name, key in found.items()}, misfit, model.in_chans)
    return list(found), left


def _load(model: nn.Module, tensors: Mapping[str, Tensor], unknown: list[str] | None = None, in_chans: int = 3) -> None:
    """`load_strictly`, but a counter of batches may be missing, and no tensor may be what a network cannot have.

    Raises:
        ValueError: as `load_strictly`, or a tensor is of integers instead of floats, without data, or not finite.
    """
    own = model.state_dict()
    tensors = {
        name: value.reshape(own[name].shape) if _is_squeezed(value, own.get(name)) else value
        for name, value in tensors.items()
    }
    if in_chans != 3:
        tensors = {name: _adapted(name, value, own.get(name), in_chans) for name, value in tensors.items()}
    for name, value in tensors.items():
        if name not in own or value is own[name] or value.shape != own[name].shape:
            continue
        shown = name.removeprefix(OURS)
        dense = value.layout == torch.strided and not (value.is_meta or value.is_quantized or value.is_nested)
        if not dense or value.is_floating_point() != own[name].is_floating_point() or value.is_complex():
            kind = "without data" if value.is_meta else f"{value.dtype}, {value.layout}".replace("torch.", "")
            raise ValueError(f"{shown} is {kind}, the model's {str(own[name].dtype).replace('torch.', '')}")
        if value.is_floating_point() and not value.to(own[name].dtype).isfinite().all():
            raise ValueError(f"it holds NaN or infinity, for example in {shown} (weights of a run that diverged?)")
    missing = {name: value for name, value in own.items() if name not in tensors}
    counters = missing if all(name.endswith(COUNTER) for name in missing) else {}
    load_strictly(model, {**tensors, **counters}, unknown)


def _is_squeezed(value: Tensor, own: Tensor | None) -> bool:
    return own is not None and value.shape != own.shape and same_shape(value.shape, own.shape)


def _adapted(name: str, value: Tensor, own: Tensor | None, in_chans: int) -> Tensor:
    """The weights of a first layer of three channels for another number of them, as timm adapts them; said."""
    if own is None or not other_channels(value.shape, own.shape) or (value.shape[1], own.shape[1]) != (3, in_chans):
        return value
    if value.layout != torch.strided or value.is_meta or not value.is_floating_point():
        return value  # it is refused, by its shape
    how = "summed" if in_chans == 1 else f"repeated, and scaled by 3 / {in_chans}"
    log.info("%s takes three channels and was adapted to %d: %s", name.removeprefix(OURS), in_chans, how)
    return adapt_input_conv(in_chans, value)


def _found(canonical: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A model's names -> the canonical names of their tensors in a file; what has none is left out.

    Args:
        canonical: a model's names -> their canonical names.
    """
    keys = matches(canonical.values(), tensors)
    return {name: keys[key] for name, key in canonical.items() if key in keys}


def _file_names(state: State, used: set[str]) -> list[str]:
    """What a file holds beyond the tensors that are used."""
    return [name for key, name in state.names.items() if key not in used] + state.others


def _misfit(weights: Weights, state: State, wanted: Shapes, error: ValueError, levels: int = 0) -> MisfitError:
    """A message that says first what the weights are of, where that is the reason.

    `levels`: of the model, 0 where that is not known.
    """
    hint = ""
    if not holds(state.tensors, wanted):
        hint = f"It looks like {looks} (--model {looks}). " if (looks := weights.looks_like()) else ""
    elif channels := channels_of(state.tensors, wanted):
        hint = f"It takes images of {(n := channels.pop()[0])} channel{'s' * (n != 1)} (--in_chans {n}). "
    if not hint and weights.levels and levels and weights.levels != levels:
        hint = f"It has {weights.levels} level{'s' * (weights.levels != 1)} (--stages {weights.levels}). "
    elif not hint and _is_first_part(state, wanted):
        hint = "It may have fewer levels (--stages). "
    return MisfitError(f"{weights.path}: {str(error).replace(MISFIT, MISFIT + hint, 1)}")


def _is_first_part(state: State, wanted: Shapes) -> bool:
    """Whether the tensors are those of a network's first layers and of no later ones."""
    names = [name for name in wanted if not name.endswith(COUNTER)]
    found = list(matches(names, state.tensors))
    return (
        0 < len(found) < len(names)
        and found == names[: len(found)]
        and holds(state.tensors, {name: wanted[name] for name in found})
    )
