"""Encoders of visible patches: one mathematics, computed packed or masked."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spark_fast.encoder.halo import Current
from spark_fast.encoder.pack import MASKED, PACKED, Table, UnsupportedLayerError, check_layers, convert
from spark_fast.encoder.visible import Visible

__all__ = ["Encoder", "MaskedEncoder", "PackedEncoder", "UnsupportedLayerError", "Visible", "pack"]


class Encoder(nn.Module):
    """A ConvNet as an encoder of visible patches.

    Args:
        network: returns a list of feature maps of falling resolution; it is converted in place.
        input_size: (H, W) in pixels.
        min_stride: feature maps finer than this are dropped (SparK decodes from stride 4 upwards).

    Attributes:
        channels, strides: of the levels kept, finest first.

    Raises:
        UnsupportedLayerError: a layer that cannot be packed, by name.
        ValueError: levels that are not a pyramid of factors of two, or an input size off the patch grid.
    """

    table: Table

    def __init__(self, network: nn.Module, input_size: tuple[int, int], min_stride: int = 4) -> None:
        super().__init__()
        check_layers(network)
        self.current = Current()
        shapes = _feature_shapes(network, input_size)
        strides = [2 ** round(math.log2(input_size[0] / s[2])) for s in shapes]
        self.levels = [i for i, stride in enumerate(strides) if stride >= min_stride]
        self.channels = [shapes[i][1] for i in self.levels]
        self.strides = [strides[i] for i in self.levels]
        _check_pyramid(self.strides, input_size)
        self.network = convert(network, self.table, self.current)

    @property
    def patch(self) -> int:
        """Pixels per patch side: the total stride."""
        return self.strides[-1]

    def forward(self, images: Tensor, visible: Visible | None = None) -> list[Tensor]:
        """Encode (B, 3, H, W).

        Returns:
            per level, finest first: the packed features (V, C_i, b_i, b_i) of the visible patches; without
            `visible` the dense maps (B, C_i, H_i, W_i) of the ordinary network.
        """
        self.current.visible = visible
        try:
            features = self.network(images if visible is None else self._enter(images, visible))
            features = [features[i] for i in self.levels]
            return features if visible is None else self._leave(features, visible)
        finally:
            self.current.visible = None

    def _enter(self, images: Tensor, visible: Visible) -> Tensor:
        raise NotImplementedError

    def _leave(self, features: list[Tensor], visible: Visible) -> list[Tensor]:
        raise NotImplementedError


class PackedEncoder(Encoder):
    """Computes on the visible patches alone, each a small image; layers exchange halos across patch edges."""

    table = PACKED

    def _enter(self, images: Tensor, visible: Visible) -> Tensor:
        return visible.pack(images)  # (V, 3, patch, patch)

    def _leave(self, features: list[Tensor], visible: Visible) -> list[Tensor]:
        return features


class MaskedEncoder(Encoder):
    """Computes on the whole image with the holes zeroed, as the published code does."""

    table = MASKED

    def _enter(self, images: Tensor, visible: Visible) -> Tensor:
        return images.masked_fill(~visible.cells(images.shape[2]), 0.0)

    def _leave(self, features: list[Tensor], visible: Visible) -> list[Tensor]:
        return [visible.pack(f) for f in features]


def pack(network: nn.Module, input_size: tuple[int, int] = (224, 224)) -> PackedEncoder:
    """Convert a network that returns a list of feature maps into a packed encoder, in place."""
    return PackedEncoder(network, input_size)


def _feature_shapes(network: nn.Module, input_size: tuple[int, int]) -> list[tuple[int, ...]]:
    """Shapes of the feature maps, found with fake tensors: nothing is computed."""
    training = network.training
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        dtype = next((p.dtype for p in network.parameters()), torch.float32)
        try:
            features = network.eval()(torch.empty(1, 3, *input_size, dtype=dtype))
        except Exception as error:
            raise ValueError(f"the network does not run on {input_size[0]}x{input_size[1]} images: {error}") from error
        finally:
            network.train(training)
    if not isinstance(features, (list, tuple)) or not all(isinstance(f, Tensor) and f.dim() == 4 for f in features):
        raise ValueError(f"the network must return a list of feature maps (B, C, H, W), got {type(features).__name__}")
    return [tuple(f.shape) for f in features]


def _check_pyramid(strides: list[int], input_size: tuple[int, int]) -> None:
    patch = strides[-1] if strides else 0
    if not strides or any(s * 2 ** (len(strides) - 1 - i) != patch for i, s in enumerate(strides)):
        raise ValueError(f"feature maps must be a pyramid, each half the one before; strides are {strides}")
    if any(side % patch for side in input_size):
        raise ValueError(f"input size {input_size[0]}x{input_size[1]} is not a multiple of the patch, {patch} px")
