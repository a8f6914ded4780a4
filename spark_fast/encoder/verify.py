"""Two checks that prove a packed encoder for any network, without knowing the network.

identity   with nothing masked it equals the network it was made from: outputs and gradients, training and
           evaluation. This catches every operation across patches that was missed, functional ones too.
no leak    changing masked pixels changes no output, and no masked pixel receives a gradient.

Both run in float64 on a small input. Parameters that start constant (a branch whose last norm starts at zero, a layer
scale of 1e-6) would hide a fault behind them, so they are randomised first.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spark_fast.encoder import PackedEncoder, UnsupportedLayerError
from spark_fast.encoder.visible import Visible
from spark_fast.masking import sample_visible

TOLERANCE = 1e-5  # relative; rounding leaves 1e-13, or 1e-6 where a layer computes in fp32 whatever it is given


@dataclass(frozen=True)
class Verified:
    """The largest relative differences that the checks met."""

    identity: float
    leak: float


class VerificationError(ValueError):
    """A packed network does not compute what the network computes; the message says which check failed, where."""


def verify(network: nn.Module, input_size: tuple[int, int] | None = None, batch: int = 2) -> Verified:
    """Run both checks on a copy of `network`.

    Args:
        network: returns a list of feature maps, as for `pack`.
        input_size: (H, W), by default three patches each way.

    Raises:
        VerificationError: a check failed.
        UnsupportedLayerError: a layer cannot be packed.
    """
    original = copy.deepcopy(network).double()
    _randomise_constants(original)
    size = input_size or _three_patches(original)
    encoder = PackedEncoder(copy.deepcopy(original), size)
    grid = (size[0] // encoder.patch, size[1] // encoder.patch)
    images = torch.randn(batch, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    identity = max(_identity(original, encoder, images, grid, training) for training in (False, True))
    if not identity < TOLERANCE:
        raise VerificationError(
            f"with nothing masked the packed network differs from the network by {identity:.1e}: "
            f"it mixes positions outside its layers, in code that packing cannot see"
        )
    leak = _leak(encoder, images, grid)
    if not leak < TOLERANCE:
        raise VerificationError(f"masked pixels reach the packed network's features, by {leak:.1e}")
    return Verified(identity, leak)


@torch.no_grad()
def _randomise_constants(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.numel() > 1 and parameter.std() == 0:
            noise = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
            parameter.copy_(0.5 + 0.1 * noise)


def _identity(
    original: nn.Module, encoder: PackedEncoder, images: Tensor, grid: tuple[int, int], training: bool
) -> float:
    everything = Visible(torch.arange(grid[0] * grid[1]).repeat(len(images), 1), grid)
    runs = []
    for module, seen in ((original.train(training), None), (encoder.train(training), everything)):
        torch.manual_seed(1)  # the same stochastic depth
        x = images.clone().requires_grad_()
        features = module(x) if seen is None else [seen.unpack(f) for f in module(x, seen)]
        features = [features[i] for i in encoder.levels] if seen is None else features
        module.zero_grad()
        sum((f * _weights(f)).sum() for f in features).backward()  # type: ignore[union-attr]
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        runs.append([*features, x.grad, *gradients])
    if len(runs[0]) != len(runs[1]):
        return float("inf")
    return max(_difference(a, b) for a, b in zip(*runs, strict=True))


def _leak(encoder: PackedEncoder, images: Tensor, grid: tuple[int, int]) -> float:
    keep = max(1, grid[0] * grid[1] // 2)
    seen = Visible(sample_visible(0, 0, torch.arange(len(images)), grid, keep), grid)
    cells = seen.cells(images.shape[2])
    outputs, leaked = [], 0.0
    for fill in (0.0, 1e3):
        torch.manual_seed(1)
        x = images.masked_fill(~cells, fill).requires_grad_()
        features = encoder.train()(x, seen)
        sum((f * _weights(f)).sum() for f in features).backward()
        outputs.append(features)
        assert x.grad is not None
        leaked = max(leaked, x.grad.masked_fill(cells, 0).abs().max().item())
    return max(leaked, *(_difference(a, b) for a, b in zip(*outputs, strict=True)))


def _weights(feature: Tensor) -> Tensor:
    """Fixed random weights, so that no gradient cancels in a sum (a norm's would)."""
    dense = torch.Generator().manual_seed(feature.shape[1])
    return torch.randn(feature.shape, dtype=feature.dtype, generator=dense)


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / (b.norm() + 1e-12)).item()


def _three_patches(network: nn.Module) -> tuple[int, int]:
    for patch in (32, 64, 16, 8, 128):
        try:
            stride = PackedEncoder(copy.deepcopy(network), (patch * 4, patch * 4)).patch
        except UnsupportedLayerError:
            raise
        except ValueError:
            continue
        return 3 * stride, 3 * stride
    raise VerificationError("no input size was found that this network takes; give input_size")
