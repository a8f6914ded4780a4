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
from spark_fast.encoder.first_difference import Record, first_difference, recorded
from spark_fast.encoder.grouped_float64 import FastGroups
from spark_fast.encoder.layer_registry import UnsupportedLayerError
from spark_fast.encoder.pyramid import NetworkFormError, as_size, feature_maps, find_pyramid
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
    network: nn.Module,
    input_size: int | tuple[int, int] | None = None,
    stages: int | None = None,
    in_chans: int = 3,
) -> Verified:
    """Run both checks on a copy of `network`.

    Args:
        network: returns a list of feature maps, as for `pack`.
        input_size: pixels, one number or (H, W), by default 2 x 3 patches.
        stages, in_chans: as for `pack`.

    Raises:
        VerificationError: a check failed; the message names the first layer that differs.
        UnsupportedLayerError: a layer cannot be packed.
    """
    original = copy.deepcopy(network).double()
    _randomise_constants(original)
    _without_dropout(original)
    size = _checked_size(original, input_size, stages, in_chans)
    shared = {id(p): p for p in original.parameters()}
    encoder = PackedEncoder(copy.deepcopy(original, shared), size, stages=stages, in_chans=in_chans)
    grid = (size[0] // encoder.patch, size[1] // encoder.patch)
    images = torch.randn(2, in_chans, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with FastGroups():
        _check_batch(original, images)
        identity = max(_identity(original, encoder, images, grid, training) for training in (False, True))
        if not identity < TOLERANCE:
            raise VerificationError(_blamed(original, encoder, images, grid, identity))
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


def _without_dropout(network: nn.Module) -> None:
    """Elements are dropped by chance, and packed ones stand elsewhere: nothing could be compared."""
    for module in network.modules():
        if isinstance(module, (nn.Dropout, nn.AlphaDropout)):
            module.p = 0.0


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
def _check_batch(original: nn.Module, images: Tensor) -> None:
    """Refuse code outside the layers that mixes images; a layer may (a BatchNorm without running statistics)."""
    original.eval()

    def run(batch: Tensor) -> Record:
        with recorded(original, lambda t: t[:1].clone()) as record:
            feature_maps(original, batch)
        return record

    found = first_difference(run(images[:1]), run(images), _differs)
    if found and found.own_code:
        raise VerificationError(
            f"{found.place(original)} {found.fault('mixes the images of a batch')}: in evaluation too, the features of "
            f"an image depend on the other images. Reduce over each image alone. {found.remedy}"
        )


@torch.no_grad()
def _blamed(original: nn.Module, encoder: PackedEncoder, images: Tensor, grid: tuple[int, int], identity: float) -> str:
    """What is wrong where the identity fails, and what to do."""
    visible = _everything(len(images), grid)

    def dense(value: Tensor) -> Tensor:
        whole = len(value) == visible.count and value.shape[2] == value.shape[3]
        return visible.unpack(value) if whole else value.clone()

    torch.manual_seed(1)  # the same stochastic depth
    with recorded(original, torch.clone) as expected:
        feature_maps(original, images)
    torch.manual_seed(1)
    with recorded(encoder.network, dense) as packed:
        encoder(images, visible)
    found = first_difference(expected, packed, _differs)
    differs = f"with nothing masked the packed network differs from the network by {identity:.1e}"
    if found is None:
        return (
            f"the network's own code mixes positions, in training or backward: {differs}, though no layer's output does"
        )
    return f"{found.place(original)} {found.fault('mixes positions')}: {differs}. {found.remedy}"


def _weights(feature: Tensor) -> Tensor:
    """Fixed random weights, so that no gradient cancels in a sum (a norm's would)."""
    dense = torch.Generator().manual_seed(feature.shape[1])
    return torch.randn(feature.shape, dtype=feature.dtype, generator=dense)


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / (b.norm() + 1e-12)).item()


def _differs(a: Tensor, b: Tensor) -> bool:
    return not _difference(a, b) < TOLERANCE


def _checked_size(
    network: nn.Module, input_size: int | tuple[int, int] | None, stages: int | None, in_chans: int
) -> tuple[int, int]:
    """(H, W), as asked or small, after a look at what the network takes and returns, and at its layers."""
    try:
        size = _few_patches(network, stages, in_chans) if input_size is None else as_size(input_size)
        find_pyramid(network, size, stages, in_chans)
    except NetworkFormError as error:
        raise VerificationError(f"{error}{_layers_too(network)}") from error
    except ValueError:
        check_layers(network)  # a layer that cannot be packed says more than a size that does not fit
        raise
    check_layers(network)
    return size


def _layers_too(network: nn.Module) -> str:
    try:
        check_layers(network)
    except UnsupportedLayerError as error:
        return f". Besides, it {error}"
    return ""


def _few_patches(network: nn.Module, stages: int | None, in_chans: int) -> tuple[int, int]:
    reasons = {}
    for patch in (32, 64, 16, 8, 128):
        try:
            stride = find_pyramid(network, (patch * 3, patch * 3), stages, in_chans).patch
        except NetworkFormError:
            raise
        except ValueError as error:
            reasons[patch * 3] = str(error)
            continue
        return 2 * stride, 3 * stride
    first, *others = reasons
    tried = f" (nor on {', '.join(map(str, others))} px)" if "does not run" in reasons[first] else ""
    raise VerificationError(f"{reasons[first]}{tried}")
