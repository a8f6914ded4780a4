"""Weights of the Hugging Face Hub by timm's own names for them: hf-hub:timm/resnet50.a1_in1k."""

from __future__ import annotations

from typing import Any

import timm
from torch import Tensor

from spark_fast.errors import CheckpointError

HUB = "hf-hub:"


def read_from_hub(name: str) -> tuple[str, dict[str, Tensor]]:
    """The network's name in timm and its weights, name -> tensor of any shape, from timm's cache or the network.

    Raises:
        CheckpointError: they cannot be loaded.
    """
    try:
        network: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # of huggingface_hub, its client, safetensors, timm: whatever it is, it names no file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{name} cannot be downloaded from the Hugging Face Hub ({type(error).__name__}: {reason}). On a machine "
            f"without a network, pass a file instead: where there is one, torch.save the state_dict() of "
            f"timm.create_model({name!r}, pretrained=True)"
        ) from None
    return network.pretrained_cfg["architecture"], network.state_dict()
