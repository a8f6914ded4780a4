"""The pre-trained encoder in timm's own names."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save
from torch import Tensor

from spark_fast.spark import SparK
from spark_fast.training.checkpoint import write_atomically


def timm_state_dict(model: SparK, name: str) -> dict[str, Tensor]:
    """The encoder's tensors under the names of `timm.create_model(name, num_classes=0)`.

    Every tensor of the encoder is there. What timm's classifier has beyond it (a final norm, in some networks) was
    not trained and is left out: `load_state_dict(..., strict=False)` then reports just that as missing.

    Raises:
        ValueError: a tensor has no counterpart in timm's model.
    """
    with torch.device("meta"):
        full = timm.create_model(name, num_classes=0).state_dict()
    # features_only networks write `stages_0` for `stages.0`
    names = {k.replace(".", "_"): k for k in full}
    state = model.encoder.network.state_dict()
    unknown = [k for k in state if k.replace(".", "_") not in names]
    if unknown:
        raise ValueError(f"{name} in timm has no tensor for {', '.join(unknown[:3])}")
    return {names[k.replace(".", "_")]: v.detach().cpu().contiguous() for k, v in state.items()}


def save_timm(model: SparK, name: str, path: Path) -> None:
    """Write `timm_state_dict` as safetensors, whole or not at all."""
    content = save(timm_state_dict(model, name), metadata={"format": "pt", "architecture": name})
    write_atomically(path, lambda file: file.write(content))
