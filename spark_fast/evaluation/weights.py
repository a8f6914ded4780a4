"""Weights for the plain network, from whatever pre-training left: a run folder, a checkpoint, an exported encoder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from spark_fast.checkpoint.file import read
from spark_fast.checkpoint.manager import candidates
from spark_fast.checkpoint.state_dict import load_strictly, strip_prefixes
from spark_fast.errors import CheckpointError
from spark_fast.networks import PUBLISHED_MODELS
from spark_fast.weights.spark_keys import encoder_name

log = logging.getLogger("spark_fast")

PARTS = ("encoder.network.", "sparse_encoder.sp_cnn.")  # where ours and published checkpoints keep the encoder


@dataclass(frozen=True)
class Weights:
    """Tensors under names without prefix, dots as underscores, ConvNeXts as timm has them."""

    path: Path
    tensors: dict[str, Tensor]
    network: str  # "" where the file does not say
    stages: int  # levels that were pre-trained; 0: all, or the file does not say


def read_weights(where: str) -> Weights:
    """Read a run folder's newest checkpoint, or a file (.pth or .safetensors).

    Raises:
        CheckpointError: nothing there, unreadable, or refused.
    """
    path = Path(where)
    if path.is_dir():
        found = candidates(path)
        if not found:
            raise CheckpointError(f"the folder {path} holds no checkpoint of a run")
        path = found[0]
    content = read(path)
    network, stages = _origin(path, content)
    state = next(
        (content[k] for k in ("model", "module", "state_dict") if isinstance(content.get(k), Mapping)), content
    )
    plain = {strip_prefixes(str(name)): value for name, value in state.items() if isinstance(value, Tensor)}
    within = [part for part in PARTS if any(name.startswith(part) for name in plain)]
    tensors = {}
    for name, value in plain.items():
        if not within or name.startswith(within[0]):
            tensors[encoder_name(name.removeprefix(within[0]) if within else name)] = value
    return Weights(path, tensors, network, stages)


def _origin(path: Path, content: Mapping) -> tuple[str, int]:
    """Network and number of stages, as far as the file says."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("architecture", ""), 0
    settings = content.get("settings")
    model = settings.get("model") if isinstance(settings, Mapping) else None
    if not isinstance(model, Mapping):
        return "", 0
    return PUBLISHED_MODELS.get(str(model.get("model", "")), str(model.get("model", ""))), int(model.get("stages", 0))


def load_into(network: nn.Module, weights: Weights, new: set[str]) -> None:
    """Load a network, whole but for the tensors that may begin anew where they are missing or of another shape.

    Args:
        new: their names: a classifier, levels that were not pre-trained.

    Raises:
        CheckpointError: a tensor is missing or of another shape, by name. The network is then unchanged.
    """
    own = network.state_dict()
    found: dict[str, Tensor] = {}
    for name, before in own.items():
        flat = encoder_name(name)
        spellings = (flat, flat.removeprefix("model_"), flat.removeprefix("body_"))
        value = next((weights.tensors[s] for s in spellings if s in weights.tensors), None)
        if value is not None and (name not in new or value.shape == before.shape):
            found[name] = value
    fresh = sorted(new - set(found))
    try:
        load_strictly(network, {**{name: own[name] for name in fresh}, **found})
    except ValueError as error:
        raise CheckpointError(f"{weights.path}: {error}") from None
    anew = ", ".join(fresh[:5]) + (f" and {len(fresh) - 5} more" if len(fresh) > 5 else "")
    log.info("%s: %d of %d tensors loaded; these begin anew: %s", weights.path, len(found), len(own), anew or "none")
