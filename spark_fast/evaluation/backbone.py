"""The plain network, without anything of SparK: as a feature extractor, and as a classifier."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from spark_fast.errors import SettingsError
from spark_fast.evaluation_mode import evaluation_mode
from spark_fast.networks import build_network, timm_channels
from spark_fast.weights.load import load_into_network
from spark_fast.weights.read import Weights
from spark_fast.weights.timm_keys import timm_names


class Backbone(nn.Module):
    """Globally pooled features of the last level that was pre-trained: (B, C, H, W) -> (B, F) fp32.

    Args:
        network: returns a list of feature maps.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """The mean over all positions."""
        return self.network(images)[-1].float().mean((2, 3))  # (B, F, h, w) -> (B, F)


class PooledClassifier(nn.Module):
    """Your own network with a linear layer on its pooled features: (B, C, H, W) -> (B, classes)."""

    def __init__(self, network: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.network(images)[-1].mean((2, 3)))


def build_backbone(name: str, stages: int, weights: Weights | None, in_chans: int = 3) -> Backbone:
    """The network of feature maps with these weights (None: as it is initialised), in eval mode and frozen.

    Args:
        stages, in_chans: see `build_network`; 0 stages: all.

    Raises:
        SettingsError: there is no such network.
        CheckpointError: the weights do not fit it.
    """
    network = _features(name, stages, in_chans)
    if weights is not None:
        load_into_network(weights, network, set(), in_chans)
    return Backbone(network).eval().requires_grad_(False)


def build_classifier(
    name: str,
    stages: int,
    weights: Weights | None,
    classes: int,
    drop_path: float,
    size: tuple[int, int],
    in_chans: int = 3,
) -> nn.Module:
    """timm's own classifier, or your network with a linear layer; its new parts begin as it initialises them.

    Args:
        stages: levels that the weights must hold; 0: all.
        drop_path: rate of stochastic depth; 0: as the network has it.
        size: (H, W) of the input; in_chans: its channels.

    Raises:
        SettingsError: there is no such network, or it takes no such rate.
        CheckpointError: the weights do not fit it.
    """
    kwargs: dict = {"drop_path_rate": drop_path} if drop_path else {}
    if ":" in name:
        network = _features(name, stages, in_chans, kwargs)
        with evaluation_mode(network), torch.no_grad():
            channels = network(torch.zeros(1, in_chans, *size))[-1].shape[1]
        model: nn.Module = PooledClassifier(network, channels, classes)
        if weights is not None:
            load_into_network(weights, network, set(), in_chans)
        return model
    with torch.device("meta"):
        encoder = timm_names(list(_features(name, stages, in_chans).state_dict()), name)
    try:
        model = timm.create_model(name, num_classes=classes, **timm_channels(in_chans), **kwargs)
    except TypeError as error:
        raise SettingsError(f"timm cannot build {name} with {kwargs}: {error}; try --drop_path 0") from error
    if weights is not None:
        load_into_network(weights, model, set(model.state_dict()) - set(encoder.values()), in_chans)
    return model


def _features(name: str, stages: int, in_chans: int, kwargs: dict | None = None) -> nn.Module:
    try:
        return build_network(name, kwargs, stages or None, in_chans)
    except ValueError as error:
        raise SettingsError(str(error)) from error
