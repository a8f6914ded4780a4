"""The pre-trained encoder as a file: in timm's own names, or those of your own network."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save
from torch import Tensor

from spark_fast.spark import SparK
from spark_fast.training.checkpoint import write_atomically


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
        flat = key.replace(".", "_")
        spellings = (flat, flat.removeprefix("model_"), flat.removeprefix("body_"))
        match = next((full[s] for s in spellings if s in full), None)
        if match is None:
            unknown.append(key)
        else:
            found[key] = match
    if unknown:
        raise ValueError(f"{name} in timm has no tensor for {', '.join(unknown[:3])}")
    return found


def encoder_state_dict(model: SparK, name: str) -> dict[str, Tensor]:
    """The encoder's tensors: under timm's names for a network of timm, under its own for `package.module:function`.

    Every tensor of the encoder is there. What timm's classifier has beyond it (a final norm, in some networks) was
    not trained and is left out: `load_state_dict(..., strict=False)` then reports just that as missing.

    Raises:
        ValueError: a tensor has no counterpart in timm's model.
    """
    state = model.encoder.network.state_dict()
    names = {k: k for k in state} if ":" in name else timm_names(list(state), name)
    return {names[k]: v.detach().cpu().contiguous() for k, v in state.items()}


def write_encoder(state: dict[str, Tensor], name: str, folder: Path) -> Path:
    """Write an `encoder_state_dict` as safetensors into `folder`, whole or not at all; returns the file."""
    own = ":" in name
    path = folder / ("encoder.safetensors" if own else f"{name}_timm.safetensors")
    content = save(state, metadata={"format": "pt", "architecture": name})
    write_atomically(path, lambda file: file.write(content))
    return path
