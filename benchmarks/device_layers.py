"""Choices of the program that a GPU has not decided yet: each measured both ways, layer by layer.

The algorithm of a convolution, batch norms by the kernels or by PyTorch, the first two layers of a decoder block as one
or apart, its last norm and the convolution to pixels likewise, and the projection into the decoder from all cells or
the visible ones. Forward and backward, in bf16 by autocast, at the batch of the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from device_jobs import ConvLayer, Job, NotHereError, Scale
from measuring import fit_rates
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn
from ways import Shape, median_seconds

from spark_fast.decoder import Decoder
from spark_fast.decoder.densify import densify, sparse_pays
from spark_fast.decoder.gpu_costs import DECODER_RATES, DecoderRates, merging_costs, projection_costs
from spark_fast.decoder.upsample import merging_pays
from spark_fast.encoder import VisiblePatches
from spark_fast.encoder.context import EncoderContext
from spark_fast.encoder.conv.kernels import use_kernels
from spark_fast.encoder.convert_network import PACKED, convert_layers
from spark_fast.encoder.layers.batch_norm import normalize, projected
from spark_fast.encoder.layers.halo import HaloConv
from spark_fast.masking import num_visible, sample_visible

PATCH, BLOCKS = 32, 5  # pixels; blocks of the decoder, log2 of it


class Comparison(NamedTuple):
    """A layer of the decoder computed both ways."""

    model: Callable[..., dict[str, float]]  # of `spark_fast.decoder.gpu_costs`
    arguments: tuple[float, ...]
    row: dict[str, Any]  # milliseconds of each


def layer_jobs(scale: Scale, device: torch.device) -> Iterator[Job]:
    """A row for each layer, some ConvNeXt blocks, and the constants of the decoder's cost model that fit its rows."""
    found: list[Comparison] = []
    shape = scale.step_shapes[0]
    for layer in scale.layers:
        kind = "depthwise" if layer.depthwise else "conv"
        name = f"{kind} {layer.kernel}x{layer.kernel} stride {layer.stride}, C {layer.channels}, b {layer.b}"
        yield Job(name, partial(_algorithms, layer, shape, scale.repeats, device), 4)
        if layer.depthwise and layer.b in (8, 2):
            name = f"ConvNeXt block, C {layer.channels}, b {layer.b}"
            yield Job(name, partial(_convnext_block, layer, shape, scale.repeats, device), 2)
    yield Job("batch norms", partial(_norms, scale, device), 4)
    for i in range(BLOCKS):
        yield Job(f"decoder block {i}", partial(_merge, i, shape, scale.repeats, device, found), 2)
    yield Job("decoder end", partial(_end, shape, scale.repeats, device), 2)
    for i in range(1, 4):
        yield Job(f"projection {i}", partial(_projection, i, shape, scale.repeats, device, found), 2)
    yield Job("DecoderRates", partial(_rates, found, device), 1)


def _algorithms(layer: ConvLayer, shape: Shape, repeats: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds by every algorithm; with the GPU's kernels where they can run."""
    context, visible = EncoderContext(dense=False), _visible(shape, device)
    groups = layer.channels if layer.depthwise else 1
    plain = nn.Conv2d(
        layer.channels, layer.channels, layer.kernel, layer.stride, layer.kernel // 2, groups=groups, bias=False
    )
    conv = convert_layers(plain, PACKED, context)[0].to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert isinstance(conv, HaloConv)
    context.visible = visible
    kernels = use_kernels(None, conv.weight)
    chosen = conv.algorithm(layer.b, visible.ratio)
    possible = ["dense"]
    if layer.kernel // 2 <= layer.b:
        possible += ["halo"] if layer.depthwise else ["halo", "im2col"]
    if kernels:
        possible.append("direct")
    x = _cells(visible.count, layer.channels, layer.b, device)
    row: dict[str, Any] = {"batch": shape.batch, "chosen": chosen, "kernels": kernels}
    for algorithm in dict.fromkeys([chosen, *possible]):
        conv.algorithm = lambda b, visible_ratio, forced=algorithm: forced  # type: ignore[method-assign, misc]
        row[f"{algorithm} ms"] = _both_passes(conv, [x], conv.parameters(), device, repeats)
    return row


def _norms(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a norm, the sum with a shortcut and a ReLU, by the kernels and by PyTorch, over all sizes.

    `LEAST_ELEMENTS` is the constant of `spark_fast.encoder.layers.batch_norm` that fits them.
    """
    shape = scale.step_shapes[0]
    visible, sizes = _visible(shape, device), {}
    ways = {"pytorch": False}
    for channels, b in scale.norms:
        norm, relu = nn.BatchNorm2d(channels).to(device), nn.ReLU(inplace=True)
        x, shortcut = (_cells(visible.count, channels, b, device) for _ in range(2))
        if use_kernels(None, x):
            ways["kernels"] = True
        size: dict[str, float] = {"elements": x.numel()}
        for way, wanted in ways.items():
            run = partial(normalize, norm, relu, kernels=wanted)
            size[way] = _both_passes(run, [x, shortcut], norm.parameters(), device, scale.repeats)
        sizes[f"C {channels}, b {b}"] = size
    totals = {f"{way} ms": sum(size[way] for size in sizes.values()) for way in ways}
    fits = {"LEAST_ELEMENTS": least_elements(sizes.values())} if "kernels" in ways else {}
    return {"batch": shape.batch, "chosen": list(ways)[-1], **totals, **fits, "sizes": sizes}


def least_elements(sizes: Iterable[dict[str, float]]) -> int | None:
    """From how many elements on the kernels are no slower, at all sizes that were measured; None: at none."""
    sizes = list(sizes)
    lost = max((size["elements"] for size in sizes if size["kernels"] > size["pytorch"]), default=0)
    return min((int(size["elements"]) for size in sizes if size["elements"] > lost), default=None)


def _convnext_block(layer: ConvLayer, shape: Shape, repeats: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a whole block by the GPU's kernels, and by PyTorch; its input is the residual stream in fp32."""
    context, visible = EncoderContext(dense=False), _visible(shape, device)
    block = convert_layers(ConvNeXtBlock(layer.channels), PACKED, context)[0]
    block = block.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = _cells(visible.count, layer.channels, layer.b, device).detach().float().requires_grad_()
    context.visible = visible
    kernels = use_kernels(None, x)
    row: dict[str, Any] = {"batch": shape.batch, "chosen": "kernels" if kernels else "PyTorch"}
    for name, context.kernels in (("kernels", True), ("PyTorch", False))[not kernels :]:
        row[f"{name} ms"] = _both_passes(block, [x], block.parameters(), device, repeats)
    return row


def _merge(number: int, shape: Shape, repeats: int, device: torch.device, found: list[Comparison]) -> dict[str, Any]:
    """Milliseconds of a decoder block with its first two layers as one, and apart."""
    width = shape.width or 768
    block = Decoder(PATCH, width).dec[number].to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    side, channels = shape.size // PATCH * 2**number, width // 2**number
    x = _cells(shape.batch, channels, side, device)
    row: dict[str, Any] = {"batch": shape.batch, "chosen": "merged" if merging_pays(x, channels) else "apart"}
    for name, merge in (("merged", True), ("apart", False)):
        block.merge = merge
        row[f"{name} ms"] = _both_passes(block, [x], block.parameters(), device, repeats)
    found.append(Comparison(merging_costs, (shape.batch, side, side, channels), row))
    return row


def _end(shape: Shape, repeats: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of the decoder's last norm and the convolution to pixels, as one operator and apart."""
    channels = (shape.width or 768) // PATCH
    norm, project = nn.BatchNorm2d(channels).to(device), nn.Conv2d(channels, 3, 1).to(device)
    x = _cells(shape.batch, channels, shape.size, device)
    kernels = use_kernels(None, x)
    row: dict[str, Any] = {"batch": shape.batch, "chosen": "one" if kernels else "apart"}
    ways: dict[str, Callable[[Tensor], Any]] = {"apart": lambda x: project(normalize(norm, None, x))}
    if kernels:
        ways["one"] = partial(projected, norm, project)
    for name, run in ways.items():
        row[f"{name} ms"] = _both_passes(run, [x], [*norm.parameters(), *project.parameters()], device, repeats)
    return row


def _projection(
    number: int, shape: Shape, repeats: int, device: torch.device, found: list[Comparison]
) -> dict[str, Any]:
    """Milliseconds of a 3x3 projection of ResNet-50's level into the decoder, from all cells or the visible ones."""
    visible, b = _visible(shape, device), 2**number
    channels, width = 2048 // b, (shape.width or 768) // b
    project = nn.Conv2d(channels, width, 3, padding=1).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, token = _cells(visible.count, channels, b, device), torch.zeros(channels, device=device, requires_grad=True)
    row: dict[str, Any] = {
        "batch": shape.batch,
        "chosen": "visible" if sparse_pays(x, visible.ratio, width) else "all",
    }
    for name, sparse in (("all", False), ("visible", True)):
        run = partial(densify, project=project, visible=visible, sparse=sparse)
        row[f"{name} ms"] = _both_passes(run, [x, token], project.parameters(), device, repeats)
    cells = shape.batch * visible.grid[0] * visible.grid[1] * b * b
    found.append(Comparison(projection_costs, (cells, visible.ratio, channels, width), row))
    return row


def _rates(found: list[Comparison], device: torch.device) -> dict[str, Any]:
    """The `DecoderRates` that fit: `spark_fast/decoder/gpu_costs.py` chooses by these constants."""
    if device.type != "cuda":
        raise NotHereError("takes a GPU")
    if not found:
        raise NotHereError("no layer of the decoder was measured")
    rates = fit_rates(DECODER_RATES, DECODER_RATES._fields, lambda rates: misfit(rates, found))
    return {"rates": "DecoderRates(" + ", ".join(f"{k}={v:.3g}" for k, v in rates._asdict().items()) + ")"}


def misfit(rates: DecoderRates, found: list[Comparison]) -> float:
    """The mean square, over layers, of the logarithms of measured seconds over the model's.

    A block has layers besides the two that are merged: of it, the difference of the two ways over the slower one.
    """
    total = 0.0
    for model, arguments, row in found:
        costs = model(*arguments, rates)
        pairs = [(row[f"{name} ms"] / 1000, cost) for name, cost in costs.items()]
        if model is projection_costs:
            total += sum(math.log(seconds / cost) ** 2 for seconds, cost in pairs) / 2
        else:
            (first, its_cost), (second, cost) = pairs
            total += ((first - second - its_cost + cost) / max(first, second)) ** 2
    return total / len(found)


def _visible(shape: Shape, device: torch.device) -> VisiblePatches:
    grid = (shape.size // PATCH, shape.size // PATCH)
    seen = sample_visible(0, 0, torch.arange(shape.batch, device=device), grid, num_visible(grid, shape.mask))
    return VisiblePatches(seen, grid)


def _cells(batch: int, channels: int, side: int, device: torch.device) -> Tensor:
    """(batch, channels, side, side) in bf16, as the layer before leaves it."""
    x = torch.randn(batch, channels, side, side, device=device, dtype=torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def _both_passes(
    run: Callable[..., Tensor], arguments: list[Tensor], weights: Iterable[Tensor], device: torch.device, repeats: int
) -> float:
    """Milliseconds of `run(*arguments)` and its backward pass."""
    wanted = [*arguments, *weights]

    def both() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            y = run(*arguments)
        torch.autograd.grad(y, wanted, torch.ones_like(y))

    return 1000 * median_seconds(both, device, repeats, 2)
