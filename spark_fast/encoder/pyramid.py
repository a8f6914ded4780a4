"""The pyramid of feature maps that a network returns: its levels, found without computing anything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

MIN_STRIDE = 4  # SparK decodes from stride 4 upwards; finer maps are dropped


class Pyramid(NamedTuple):
    """The levels kept, finest first."""

    levels: list[int]  # which of the network's maps
    channels: list[int]
    strides: list[int]

    @property
    def patch(self) -> int:
        """Pixels per patch side: the total stride."""
        return self.strides[-1]


def feature_maps(network: nn.Module, images: Tensor) -> list[Tensor]:
    """The network's maps, (B, C_i, H_i, W_i) each; those of timm's channels-last networks are turned round."""
    maps = network(images)
    if not isinstance(maps, (list, tuple)) or not all(isinstance(m, Tensor) and m.dim() == 4 for m in maps):
        raise TypeError(f"the network must return a list of feature maps (B, C, H, W), got {type(maps).__name__}")
    last = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
    return [m.permute(0, 3, 1, 2) if last else m for m in maps]


def pyramid(network: nn.Module, input_size: tuple[int, int], stages: int | None = None) -> Pyramid:
    """Find the levels with fake tensors.

    Args:
        network: returns a list of feature maps.
        input_size: (H, W) in pixels.
        stages: keep the first so many levels, all by default.

    Raises:
        ValueError: the network does not take that size, returns no pyramid of factors of two or fewer levels than
            asked for, or the size is off the patch grid.
    """
    shapes = _shapes(network, input_size)
    strides = [2 ** round(math.log2(input_size[0] / s[2])) for s in shapes]
    levels = [i for i, stride in enumerate(strides) if stride >= MIN_STRIDE]
    if stages is not None and not 1 <= stages <= len(levels):
        raise ValueError(f"stages must be from 1 to {len(levels)}, the levels of this network, got {stages}")
    levels = levels[:stages]
    found = Pyramid(levels, [shapes[i][1] for i in levels], [strides[i] for i in levels])
    _check(found, shapes, input_size)
    return found


@contextmanager
def shapes_only(network: nn.Module) -> Iterator[torch.dtype]:
    """Run `network` on fake tensors, in evaluation mode, to learn shapes: nothing is computed. Gives its dtype."""
    modes = [(module, module.training) for module in network.modules()]
    parameter = next(network.parameters(), torch.empty(0))
    try:
        network.eval()
        # autocast would keep fake copies of the weights for real calls
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.autocast(parameter.device.type, enabled=False), torch.no_grad(), fake, parameter.device:
            yield parameter.dtype
    finally:
        for module, mode in modes:
            module.training = mode


def _shapes(network: nn.Module, input_size: tuple[int, int]) -> list[tuple[int, ...]]:
    with shapes_only(network) as dtype:
        try:
            maps = feature_maps(network, torch.empty(1, 3, *input_size, dtype=dtype))
        except TypeError as error:
            raise ValueError(str(error)) from error
        except Exception as error:
            raise ValueError(f"the network does not run on {input_size[0]}x{input_size[1]} images: {error}") from error
    return [tuple(m.shape) for m in maps]


def _check(found: Pyramid, shapes: list[tuple[int, ...]], input_size: tuple[int, int]) -> None:
    strides = found.strides
    patch = strides[-1] if strides else 0
    if not strides or any(s * 2 ** (len(strides) - 1 - i) != patch for i, s in enumerate(strides)):
        raise ValueError(f"feature maps must be a pyramid, each half the one before; strides are {strides}")
    if any(side % patch for side in input_size):
        raise ValueError(f"input size {input_size[0]}x{input_size[1]} is not a multiple of the patch, {patch} px")
    for level, stride in zip(found.levels, strides, strict=True):
        expected = (input_size[0] // stride, input_size[1] // stride)
        if shapes[level][2:] != expected:
            raise ValueError(
                f"feature map {level} is {shapes[level][2]}x{shapes[level][3]}, where stride {stride} of "
                f"{input_size[0]}x{input_size[1]} px gives {expected[0]}x{expected[1]}: patches do not stay aligned"
            )
