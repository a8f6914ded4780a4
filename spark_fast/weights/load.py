"""Weights into a model: whole or not at all, with a message that names what does not fit."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from spark_fast.checkpoint.state_dict import load_strictly
from spark_fast.errors import MisfitError
from spark_fast.method import Method
from spark_fast.weights.read import State, Weights, read_state, read_weights
from spark_fast.weights.spark_keys import ENCODER, canonical_name, network_name
from spark_fast.weights.timm_keys import WRAPPERS, spellings

log = logging.getLogger("spark_fast")


def load_weights(path: Path, model: Method) -> None:
    """Read weights (see `read_weights`) and load them into a model from `build_spark`, as `load_into_spark`."""
    load_into_spark(read_weights(path), model)


def load_into_spark(weights: Weights, model: Method) -> None:
    """Load a model from `build_spark`: the whole of it, or its encoder where the weights are of a plain network.

    What a plain network has beyond the encoder (timm's classifier) is left out. That, and that the decoder is new, is
    logged.

    Raises:
        MisfitError: a tensor is missing, unknown or of another shape, by name. The model is then unchanged.
    """
    state = weights.state
    try:
        if state.has_decoder:
            _load_whole(state, model)
            return
        left = _load_encoder(state, model)
    except ValueError as error:
        raise MisfitError(f"{weights.path}: {error}") from None
    shown = ", ".join(left[:5]) or "nothing"
    log.info("%s: the encoder is loaded, the decoder begins anew; left out: %s", weights.path, shown)


def load_spark_state_dict(model: Method, state: Mapping) -> None:
    """Load a checkpoint of the published code into a model from `build_spark`.

    Args:
        state: the state dict itself, or the whole checkpoint (see `tensors_of`); ResNets in timm's names, ConvNeXts
            in the official ones. The three deprecated buffers and "config" are ignored.

    Raises:
        ValueError: tensors missing, unknown, or of another shape, by name. The model is then unchanged.
    """
    _load_whole(read_state(state), model)


def load_into_network(weights: Weights, network: nn.Module, new: set[str]) -> None:
    """Load a plain network, whole but for the tensors that may begin anew where they are missing or of another shape.

    Args:
        new: their names: a classifier, levels that were not pre-trained.

    Raises:
        MisfitError: a tensor is missing or of another shape, by name. The network is then unchanged.
    """
    own, tensors = network.state_dict(), weights.state.tensors
    keys = _matches({name: ENCODER + network_name(name) for name in own}, tensors)
    found = {n: tensors[k] for n, k in keys.items() if n not in new or tensors[k].shape == own[n].shape}
    fresh = sorted(new - set(found))
    try:
        load_strictly(network, {**{name: own[name] for name in fresh}, **found})
    except ValueError as error:
        raise MisfitError(f"{weights.path}: {error}") from None
    anew = ", ".join(fresh[:5]) + (f" and {len(fresh) - 5} more" if len(fresh) > 5 else "")
    log.info("%s: %d of %d tensors loaded; these begin anew: %s", weights.path, len(found), len(own), anew or "none")


def _load_whole(state: State, model: Method) -> None:
    found = _matches({name: canonical_name(name) for name in model.state_dict()}, state.tensors)
    unknown = _file_names(state, set(found.values()))
    load_strictly(model, {name: state.tensors[key] for name, key in found.items()}, unknown)


def _load_encoder(state: State, model: Method) -> list[str]:
    """Load the encoder; returns what is left out of the file, by its names there."""
    own = model.state_dict()
    encoder = [name for name in own if name.startswith("encoder.network.")]
    found = _matches({name: canonical_name(name) for name in encoder}, state.tensors)
    left = sorted(_file_names(state, set(found.values())))
    kept = {name: value for name, value in own.items() if name not in encoder}
    misfit = left if len(found) < len(encoder) else []  # another network's, then: they tell which
    load_strictly(model, kept | {name: state.tensors[key] for name, key in found.items()}, misfit)
    return left


def _matches(canonical: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A model's names -> the canonical names of their tensors in a file; what has none is left out.

    Args:
        canonical: a model's names -> their canonical names.
    """
    found = {}
    for name, key in canonical.items():
        match = next((k for k in _candidates(key) if k in tensors), None)
        if match is not None:
            found[name] = match
    return found


def _candidates(key: str) -> Iterator[str]:
    """A canonical name, and what it is where timm has wrapped the network and the file has not, or the reverse."""
    if not key.startswith(ENCODER):
        yield key
        return
    inner = key.removeprefix(ENCODER)
    yield from (ENCODER + name for name in spellings(inner))
    yield from (ENCODER + wrapper + inner for wrapper in WRAPPERS)


def _file_names(state: State, used: set[str]) -> list[str]:
    """What a file holds beyond the tensors that are used."""
    return [name for key, name in state.names.items() if key not in used] + state.others
