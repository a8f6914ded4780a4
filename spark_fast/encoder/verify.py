"""Two checks that verify a packed encoder for any network, without knowing the network.

identity   with nothing masked it equals the network it was made from: outputs and gradients, training and
           evaluation. This catches every operation across patches that was missed, functional ones too.
no leak    changing masked pixels changes no output, and no masked pixel receives a gradient.

Both run in float64 on a small input. Parameters that start constant (a branch whose last norm starts at zero, a layer
scale of 1e-6) would hide a fault behind them, so they are randomised first. Gradients of parameters are compared by
their product with two random vectors each, so that even a network of a billion parameters needs room for its
parameters once: two different gradients have the same product with probability zero.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spark_fast.encoder import PackedEncoder
from spark_fast.encoder.convert_network import check_layers
from spark_fast.encoder.grouped_float64 import FastGroups
from spark_fast.encoder.pyramid import as_size, feature_maps, find_pyramid
from spark_fast.encoder.visible import VisiblePatches
from spark_fast.masking import sample_visible

# relative; rounding leaves 1e-13, or 1e-5 where a layer computes in fp32 whatever it is given (EvoNorm)
TOLERANCE = 1e-4
NEGLIGIBLE = 1e-8  # a gradient this small beside the largest is rounding (a bias before a batch norm has none)


@dataclass(frozen=True)
class Verified:
    """The largest relative differences that the checks met."""

    identity: float
    leak: float


class VerificationError(ValueError):
    """A packed network does not compute what the network computes; the message says which check failed, where."""


def verify(
    network: nn.Module, input_size: int | tuple[int, int] | None = None, batch: int = 2, stages: int | None = None
) -> Verified:
    """Run both checks on a copy of `network`.

    Args:
        network: returns a list of feature maps, as for `pack`.
        input_size: pixels, one number or (H, W), by default 2 x 3 patches.
        batch: images.
        stages: as for `pack`.

    Raises:
        VerificationError: a check failed; the message names the first layer that differs.
        UnsupportedLayerError: a layer cannot be packed.
    """
    original = copy.deepcopy(network).double()
    _randomise_constants(original)
    check_layers(original)
    size = _few_patches(original, stages) if input_size is None else as_size(input_size)
    shared = {id(p): p for p in original.parameters()}
    encoder = PackedEncoder(copy.deepcopy(original, shared), size, stages=stages)
    grid = (size[0] // encoder.patch, size[1] // encoder.patch)
    images = torch.randn(batch, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with FastGroups():
        identity = max(_identity(original, encoder, images, grid, training) for training in (False, True))
        if not identity < TOLERANCE:
            where = _first_difference(original, encoder, images, grid)
            raise VerificationError(
                f"with nothing masked the packed network differs from the network by {identity:.1e}{where}: "
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


def _everything(count: int, grid: tuple[int, int]) -> VisiblePatches:
    return VisiblePatches(torch.arange(grid[0] * grid[1]).repeat(count, 1), grid)


def _identity(
    original: nn.Module, encoder: PackedEncoder, images: Tensor, grid: tuple[int, int], training: bool
) -> float:
    visible = _everything(len(images), grid)
    runs = []
    for module in (original.train(training), encoder.train(training)):
        torch.manual_seed(1)  # the same stochastic depth
        x = images.clone().requires_grad_()
        with _projected_gradients(original) as gradients:
            if module is encoder:
                features = [visible.unpack(f) for f in encoder(x, visible)]
            else:
                maps = feature_maps(original, x)
                features = [maps[i] for i in encoder.levels]
            torch.stack([(f * _weights(f)).sum() for f in features]).sum().backward()
        assert x.grad is not None
        runs.append(([f.detach() for f in features] + [x.grad], gradients))
    (maps, expected), (packed, got) = runs
    if set(expected) != set(got):
        return float("inf")
    largest = max((norm for _, norm in expected.values()), default=0.0)
    return max(
        *(_difference(b, a) for a, b in zip(maps, packed, strict=True)),
        *(abs(p - got[n][0]) / (norm + NEGLIGIBLE * largest + 1e-30) for n, (p, norm) in expected.items()),
    )


@contextmanager
def _projected_gradients(network: nn.Module) -> Iterator[dict[int, tuple[float, float]]]:
    """Parameter number -> (product of its gradient with a fixed random direction, its norm); gradients are freed."""
    found: dict[int, tuple[float, float]] = {}
    hooks = ExitStack()
    for number, parameter in enumerate(network.parameters()):
        if not parameter.requires_grad:
            continue

        def project(p: Tensor, number: int = number) -> None:
            assert p.grad is not None
            generator, grad = torch.Generator().manual_seed(number), p.grad.reshape(len(p) if p.dim() else 1, -1)
            left, right = (torch.randn(n, dtype=p.dtype, generator=generator) for n in grad.shape)
            found[number] = (torch.dot(left, grad @ right).item(), grad.norm().item())
            p.grad = None

        hooks.enter_context(parameter.register_post_accumulate_grad_hook(project))
    with hooks:
        yield found


def _leak(encoder: PackedEncoder, images: Tensor, grid: tuple[int, int]) -> float:
    keep = max(1, grid[0] * grid[1] // 2)
    visible = VisiblePatches(sample_visible(0, 0, torch.arange(len(images)), grid, keep), grid)
    cells = visible.cells(images.shape[2])
    outputs, leaked = [], 0.0
    for fill in (0.0, 1e3):
        torch.manual_seed(1)
        x = images.masked_fill(~cells, fill).requires_grad_()
        features = encoder.train()(x, visible)
        total = torch.stack([(f * _weights(f)).sum() for f in features]).sum()
        outputs.append([f.detach() for f in features])
        if not fill:
            (gradient,) = torch.autograd.grad(total, x)
            leaked = gradient.masked_fill(cells, 0).abs().max().item()
    return max(leaked, *(_difference(a, b) for a, b in zip(*outputs, strict=True)))


@torch.no_grad()
def _first_difference(original: nn.Module, encoder: PackedEncoder, images: Tensor, grid: tuple[int, int]) -> str:
    """Where the two networks first differ, in the order of execution: " (first at PATH, a TYPE)".

    A module whose input differs already, and nothing before it does, was given that by the code of its parent.
    """
    visible = _everything(len(images), grid)
    torch.manual_seed(1)  # the same stochastic depth
    with _recorded(original, None) as dense:
        feature_maps(original, images)
    torch.manual_seed(1)
    with _recorded(encoder.network, visible) as packed:
        encoder(images, visible)
    for path in dense:
        wrong = [
            got.shape == expected.shape and not _difference(got, expected) < TOLERANCE
            for got, expected in zip(packed[path], dense[path], strict=True)
        ]  # the input, the output
        if any(wrong):
            blamed = path.rpartition(".")[0] if wrong[0] else path
            return f" (first at {blamed or 'the network'}, a {type(original.get_submodule(blamed)).__name__})"
    return ""


@contextmanager
def _recorded(network: nn.Module, visible: VisiblePatches | None) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Path -> (input, output) of every module at its first call, as dense maps, in the order of completion."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def dense(value: object) -> Tensor:
        if not isinstance(value, Tensor) or value.dim() != 4:
            return torch.empty(0)
        whole = visible is not None and len(value) == visible.count and value.shape[2] == value.shape[3]
        return visible.unpack(value) if visible is not None and whole else value.clone()

    hooks = ExitStack()
    for path, module in network.named_modules():

        def record(_: nn.Module, inputs: tuple, output: object, path: str = path) -> None:
            found.setdefault(path, (dense(inputs[0] if inputs else None), dense(output)))

        hooks.enter_context(module.register_forward_hook(record))
    with hooks:
        yield found


def _weights(feature: Tensor) -> Tensor:
    """Fixed random weights, so that no gradient cancels in a sum (a norm's would)."""
    dense = torch.Generator().manual_seed(feature.shape[1])
    return torch.randn(feature.shape, dtype=feature.dtype, generator=dense)


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / (b.norm() + 1e-12)).item()


def _few_patches(network: nn.Module, stages: int | None) -> tuple[int, int]:
    reasons = []
    for patch in (32, 64, 16, 8, 128):
        try:
            stride = find_pyramid(network, (patch * 3, patch * 3), stages).patch
        except ValueError as error:
            reasons.append(str(error))
            continue
        return 2 * stride, 3 * stride
    raise VerificationError(f"no input size was found that this network takes: {reasons[0]}")
