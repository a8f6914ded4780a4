"""The tensors of a file under canonical names, wherever they lie in it.

A file may hold them in nested dictionaries (`state_dict`, `teacher`), and a wrapper may have put its own name before
theirs (`model.`, `backbone.`, `module.encoder_q.`). Both make one dotted prefix. A prefix is taken if every tensor of
the network in question follows it, with its shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from spark_fast.checkpoint.state_dict import strip_prefixes, tensors_of
from spark_fast.weights.fcmae_keys import from_published, is_published_fcmae
from spark_fast.weights.spark_keys import ENCODER, IGNORED, canonical_name, is_spark_name, network_name
from spark_fast.weights.timm_keys import WRAPPERS, spellings

Shapes = Mapping[str, torch.Size]  # canonical name -> shape

ALWAYS_THERE = "mask_tokens.0"  # in a file of SparK, and in no other
COUNTER = "num_batches_tracked"  # of BatchNorm; nothing is computed from it, and some programs leave it out
MOST_DICTIONARIES = 1000  # that a file of weights may nest; one that contains itself has no end
LEFT_OUT = "optimizer"  # its tensors are no weights, and twice as large


@dataclass(frozen=True)
class State:
    """The tensors of a model, whichever program wrote them.

    Attributes:
        tensors: of any shape, under canonical names (see `spark_keys`).
        names: canonical name -> name in the file, for messages.
        others: names of entries that are no tensors.
        has_decoder: False for a plain network (the encoder alone, perhaps with a classifier).
        prefix: where in the file they lie, "" for the usual places (see `tensors_of`).
    """

    tensors: dict[str, Tensor]
    names: dict[str, str]
    others: list[str]
    has_decoder: bool
    prefix: str = ""

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Canonical name -> shape."""
        return {name: value.shape for name, value in self.tensors.items()}


def read_state(content: Mapping) -> State:
    """The tensors in a checkpoint, or in a state dict, of SparK or of a plain network.

    Raises:
        ValueError: two tensors of one name; several models of SparK, with the places.
    """
    named = {str(name): value for name, value in tensors_of(content).items()}
    if is_published_fcmae(named):
        dense = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        found = from_published(dense)
        return State(found, dict(zip(found, dense, strict=True)), [], has_decoder=True)
    if any(map(is_spark_name, named)):
        return _state(named, has_decoder=True)
    below = flatten(content)
    prefixes = sorted({name.removesuffix(ALWAYS_THERE) for name in below if f".{name}".endswith(f".{ALWAYS_THERE}")})
    if len(prefixes) > 1:
        raise ValueError(which_of(prefixes))
    if prefixes:
        return _state(beneath(below, prefixes[0]), has_decoder=True, prefix=prefixes[0])
    return _state(named, has_decoder=False)


def decoder_levels(names: Iterable[str]) -> int:
    """Levels of the pyramid that SparK's decoder takes, by the canonical names of a model's tensors; 0 without one."""
    return len({match[1] for name in names if (match := re.match(r"densify_norms_(\d+)_", name))})


def flatten(content: Mapping) -> dict[str, Tensor]:
    """Every tensor in nested dictionaries, of any shape, by its path: `state_dict.model.conv1.weight`.

    An optimiser's tensors are left out.

    Raises:
        ValueError: two tensors have one name, or there are more than MOST_DICTIONARIES dictionaries.
    """
    found: dict[str, Tensor] = {}
    todo = [("", content)]
    for _ in range(MOST_DICTIONARIES):
        if not todo:
            return found
        prefix, here = todo.pop()
        for key, value in here.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping) and isinstance(key, str) and key != LEFT_OUT:
                todo.append((f"{name}.", value))
            elif isinstance(value, Tensor):
                if name in found:
                    raise ValueError(f"it has two tensors named {name}")
                found[name] = value
    raise ValueError(f"it nests more than {MOST_DICTIONARIES} dictionaries")


def beneath(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors, of any shape, whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def places_of(shapes: Shapes, tensors: Mapping[str, Tensor]) -> list[State]:
    """Each place in a file where a plain network lies whole.

    Args:
        shapes: of the network, under canonical names.
        tensors: all of the file, of any shape, see `flatten`.
    """
    sought = max((name for name in shapes if not name.endswith(COUNTER)), key=len, default="")
    anchor = set(spellings(sought.removeprefix(ENCODER)))
    prefixes = {prefix for name in tensors if (prefix := _before(anchor, name)) is not None}
    found = []
    for prefix in sorted(prefixes):
        with suppress(ValueError):  # names that are the same to a network: not one of its own
            found.append(_state(beneath(tensors, prefix), has_decoder=False, prefix=prefix))
    return [state for state in found if holds(state.tensors, shapes)]


def holds(tensors: Mapping[str, Tensor], shapes: Shapes) -> bool:
    """Whether every tensor of a model is among `tensors`, with its shape (see `same_shape`).

    One difference is allowed: images of another number of channels, C of the first kernel, (O, C, ky, kx).
    """
    found = matches(shapes, tensors)
    whole = all(
        name in found and (same_shape(now := tensors[found[name]].shape, shape) or other_channels(now, shape))
        for name, shape in shapes.items()
        if not name.endswith(COUNTER)
    )
    return whole and len(channels_of(tensors, shapes)) < 2


def other_channels(found: torch.Size, wanted: torch.Size) -> bool:
    """Whether two kernels (O, C, ky, kx) differ in C alone."""
    return len(found) == len(wanted) == 4 and found[1] != wanted[1] and (found[0], found[2:]) == (wanted[0], wanted[2:])


def channels_of(tensors: Mapping[str, Tensor], shapes: Shapes) -> set[tuple[int, int]]:
    """Pairs of C in the tensors and in the model, for kernels (O, C, ky, kx) that differ in C alone.

    For tensors of this network there is at most one pair, the channels of its images.
    """
    pairs = ((tensors[key].shape, shapes[name]) for name, key in matches(shapes, tensors).items())
    return {(found[1], wanted[1]) for found, wanted in pairs if other_channels(found, wanted)}


def same_shape(found: torch.Size, wanted: torch.Size) -> bool:
    """Whether a tensor of one shape is one of the other: linear layers are 1x1 convolutions, GRN's vectors (1, C).

    Any other shape of as many numbers is another tensor.
    """
    if len(wanted) == 1:
        return tuple(found) == (*[1] * (len(found) - 1), *wanted)
    short, long = sorted((tuple(found), tuple(wanted)), key=len)
    return found == wanted or (len(short) == 2 and long == (*short, 1, 1))


def matches(names: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Canonical name in a model -> name of its tensor, of any shape, in a file; names without a tensor are left out."""
    found = {name: next((key for key in _candidates(name) if key in tensors), None) for name in names}
    return {name: key for name, key in found.items() if key is not None}


def wrapper_of(shapes: Shapes, state: State) -> str:
    """The wrapper of WRAPPERS that a file of a network has before its names; "" for none."""
    name, key = next(iter(matches(shapes, state.tensors).items()), ("", ""))
    inner = name.removeprefix(ENCODER)
    return key.removeprefix(ENCODER).removesuffix(inner).rstrip("_") if len(key) > len(name) else ""


def which_of(prefixes: Iterable[str]) -> str:
    """The message where several places fit."""
    names = [prefix.rstrip(".") for prefix in prefixes]
    return (
        f"several models in it fit: {', '.join(name or 'the one without a prefix' for name in names)}. Choose "
        f"one by a suffix to the file's name: {' or '.join(f'#{name}' for name in names if name)}"
    )


def _state(named: Mapping[str, object], *, has_decoder: bool, prefix: str = "") -> State:
    tensors, names, others = dict[str, Tensor](), dict[str, str](), []
    for name, value in named.items():
        if strip_prefixes(name) in IGNORED:
            continue
        if not isinstance(value, Tensor):
            others.append(f"{name} ({type(value).__name__})")
            continue
        inner = name if prefix else strip_prefixes(name)  # a place has its wrappers' names in its prefix
        key = canonical_name(name) if has_decoder else ENCODER + network_name(inner)
        if key in tensors:
            raise ValueError(f"{prefix}{names[key]} and {prefix}{name} name the same tensor, and it holds both")
        tensors[key], names[key] = value, name
    return State(tensors, names, others, has_decoder, prefix)


def _before(anchor: set[str], name: str) -> str | None:
    """The part of a file's name before one of these canonical names; None where it ends with none of them."""
    cuts = [0, *(match.end() for match in re.finditer(r"\.", name))]
    return next((name[:cut] for cut in reversed(cuts) if network_name(name[cut:]) in anchor), None)


def _candidates(key: str) -> Iterator[str]:
    """A canonical name, and the one that it has if timm wraps the network and the file does not, or the reverse."""
    if not key.startswith(ENCODER):
        yield key
        return
    inner = key.removeprefix(ENCODER)
    yield from (ENCODER + name for name in spellings(inner))
    yield from (ENCODER + wrapper + inner for wrapper in WRAPPERS)
