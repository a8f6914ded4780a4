"""Begin a run from weights: a checkpoint of ours, a published one, or an encoder alone in timm's names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from spark_fast.checkpoint.file import read
from spark_fast.checkpoint.state_dict import load_strictly, strip_prefixes, tensors_of
from spark_fast.errors import CheckpointError
from spark_fast.weights.spark_keys import encoder_name, load_spark_state_dict

log = logging.getLogger("spark_fast")


def load_weights(path: Path, model: nn.Module) -> None:
    """Load a file (.pth or .safetensors) into a model from `build_spark`, or an encoder's into its encoder.

    Raises:
        CheckpointError: unreadable, refused, or it does not fit, by name. The model is then unchanged.
    """
    fit(path, read(path), model)


def fit(path: Path, content: Mapping, model: nn.Module) -> bool:
    """Load what `read(path)` returned; True when decoder and all came with it, False for an encoder alone.

    Raises:
        CheckpointError: as `load_weights`.
    """
    state = tensors_of(content)
    try:
        if _load_encoder(path, state, model):
            return False
        load_spark_state_dict(model, state)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return True


def _load_encoder(path: Path, state: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Load a network's own state dict into the encoder; False, and nothing done, when it is SparK's or another's.

    What the network has beyond the encoder (timm's classifier) is left out, and told; so is that the decoder is new.
    """
    prefix = "encoder.network."
    parts = (prefix, "sparse_encoder.", "densify_", "mask_tokens")
    if any(strip_prefixes(str(name)).startswith(parts) for name in state):
        return False
    own: dict[str, str] = {}
    for name in model.state_dict():
        flat = encoder_name(name)
        if name.startswith(prefix):
            own |= dict.fromkeys((flat, flat.removeprefix("model_"), flat.removeprefix("body_")), name)
    found = {own[flat]: value for k, value in state.items() if (flat := encoder_name(strip_prefixes(str(k)))) in own}
    whole = {name for name in model.state_dict() if name.startswith(prefix)}
    if not found or not whole <= set(found):
        return False
    load_strictly(model, {**model.state_dict(), **found})
    left = sorted(str(k) for k in state if encoder_name(strip_prefixes(str(k))) not in own)
    log.info("%s: the encoder is loaded, the decoder begins anew; left out: %s", path, ", ".join(left[:5]) or "nothing")
    return True
