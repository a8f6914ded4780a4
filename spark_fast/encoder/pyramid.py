"""The pyramid of feature maps that a network returns: its levels, found without computing anything."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

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


def as_size(input_size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of an input size that may be one number."""
    return (input_size, input_size) if isinstance(input_size, int) else input_size


def feature_maps(network: nn.Module, images: Tensor) -> list[Tensor]:
    """The network's maps, (B, C_i, H_i, W_i) each; those of timm's channels-last networks are turned round."""
    return _channels_first(network, network(images))


def _channels_first(network: nn.Module, maps: object) -> list[Tensor]:
    if not isinstance(maps, (list, tuple)) or not all(isinstance(m, Tensor) and m.dim() == 4 for m in maps):
        raise ValueError(f"the network must return a list of feature maps (B, C, H, W), got {type(maps).__name__}")
    last = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
    return [m.permute(0, 3, 1, 2) if last else m for m in maps]


def find_pyramid(network: nn.Module, input_size: tuple[int, int], stages: int | None = None) -> Pyramid:
    """Find the levels of a network, on the meta device.

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


def run_on_meta(module: nn.Module, *args: object) -> list[Tensor]:
    """`module(*args)` in evaluation mode on the meta device, to learn shapes: nothing is computed, nothing changed."""
    modes = [(m, m.training) for m in module.modules()]
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    state = {name: torch.empty_like(t, device="meta") for name, t in tensors}
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return functional_call(module.eval(), state, args)
    finally:
        for m, mode in modes:
            m.training = mode


def meta_images(network: nn.Module, count: int, input_size: tuple[int, int]) -> Tensor:
    """(count, 3, H, W) of the network's dtype, without content."""
    dtype = next((p.dtype for p in network.parameters()), torch.float32)
    return torch.empty(count, 3, *input_size, dtype=dtype, device="meta")


def _shapes(network: nn.Module, input_size: tuple[int, int]) -> list[tuple[int, ...]]:
    try:
        maps = run_on_meta(network, meta_images(network, 1, input_size))
    except Exception as error:
        raise ValueError(f"the network does not run on {input_size[0]}x{input_size[1]} images: {error}") from error
    return [tuple(m.shape) for m in _channels_first(network, maps)]


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
