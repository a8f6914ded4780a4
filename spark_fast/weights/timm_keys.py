"""The pre-trained encoder as a file: in timm's own names, or those of your own network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import timm
import torch
from safetensors.torch import save
from torch import Tensor

from spark_fast.files import atomic_write
from spark_fast.method import Method

WRAPPERS = ("model_", "body_")


def spellings(name: str) -> Iterator[str]:
    """A name with underscores for dots: as it is, and without a wrapper that timm's `features_only` may add."""
    yield name
    yield from (name.removeprefix(wrapper) for wrapper in WRAPPERS)


def timm_names(keys: list[str], name: str) -> dict[str, str]:
    """Names of a features_only network -> names of `timm.create_model(name, num_classes=0)`.

    timm writes `stages_0` for `stages.0` there, and puts some networks under `model.` or `body.`.

    Raises:
        ValueError: a name has no counterpart.
    """
    with torch.device("meta"):
        full = {k.replace(".", "_"): k for k in timm.create_model(name, num_classes=0).state_dict()}
    found, unknown = {}, []
    for key in keys:
        match = next((full[s] for s in spellings(key.replace(".", "_")) if s in full), None)
        if match is None:
            unknown.append(key)
        else:
            found[key] = match
    if unknown:
        raise ValueError(f"timm's {name} has no tensor for {', '.join(unknown[:3])}")
    return found


def encoder_names(model: Method, name: str) -> dict[str, str]:
    """Names of the encoder's tensors in the model -> in its file: timm's, or for `package.module:function` its own.

    Raises:
        ValueError: a tensor has no counterpart in timm's model.
    """
    keys = list(model.encoder.network.state_dict())
    names = {k: k for k in keys} if ":" in name else timm_names(keys, name)
    return {f"encoder.network.{key}": names[key] for key in keys}


def renamed(state: Mapping[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The tensors, of any shape, of a state dict that have a new name in `names`, under it, copied to the host."""
    return {new: state[name].detach().cpu().contiguous() for name, new in names.items()}


def encoder_state_dict(model: Method, name: str) -> dict[str, Tensor]:
    """The encoder's tensors, of any shape, under their `encoder_names`.

    Every tensor of the encoder is there. A tensor that only timm's classifier has, such as the final norm of some
    networks, was not trained and is left out: `load_state_dict(..., strict=False)` then reports it as missing.
    """
    return renamed(model.state_dict(), encoder_names(model, name))


def safetensors_metadata(name: str, stages: int, untrained: Iterable[str] = ()) -> dict[str, str]:
    """What a file of safetensors says of its tensors; the reader of weights takes it from there.

    Args:
        stages: levels that were pre-trained; 0: all.
        untrained: names of tensors that were not pre-trained.
    """
    known = {"stages": str(stages or ""), "untrained": " ".join(untrained)}
    return {"format": "pt", "architecture": name} | {key: value for key, value in known.items() if value}


def write_encoder(state: dict[str, Tensor], name: str, folder: Path, stages: int = 0) -> Path:
    """Write an `encoder_state_dict`, name -> tensor of any shape, atomically into `folder`; returns the file.

    `stages`: levels that were pre-trained; 0: all.
    """
    own = ":" in name
    path = folder / ("encoder.safetensors" if own else f"{name}_timm.safetensors")
    content = save(state, metadata=safetensors_metadata(name, stages))
    with atomic_write(path) as file:
        file.write(content)
    return path
