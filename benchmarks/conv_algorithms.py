"""Is the algorithm that `choose_algorithm` takes for a convolution the fastest? Every algorithm of every layer.

    python benchmarks/conv_algorithms.py
    python benchmarks/conv_algorithms.py --device cuda --precision bf16 --batch 256

On a GPU, with its kernels, it also prints the `GpuRates` that fit what was measured: the constants of the model by
which the algorithm is chosen there (`spark_fast/encoder/conv/costs.py`).

Forward and backward of single layers, as they occur in ResNets, ResNeXts, ConvNeXts, EfficientNets and InceptionNeXts:
kernels, groups, channels, cells per patch and mask ratios. For each, the algorithms that can compute it
alternate and the medians are kept; "loss" is the time of the chosen one over that of the fastest.

A result recorded up to 26 November 2026 names them window (halo), columns (im2col) and canvas (dense).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import tyro
from measuring import clock, fit_rates, machine, medians, save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from spark_fast.encoder import VisiblePatches
from spark_fast.encoder.conv.convolve import convolve
from spark_fast.encoder.conv.costs import GPU_RATES, GpuRates, choose_algorithm, gpu_costs
from spark_fast.encoder.conv.geometry import layer_axes
from spark_fast.encoder.conv.kernels import use_kernels
from spark_fast.masking import sample_visible
from spark_fast.run.malloc import keep_heap


class Layer(NamedTuple):
    """A convolution of patches of b x b cells."""

    k: tuple[int, int]
    stride: int
    channels: int
    groups: int
    b: int

    @property
    def text(self) -> str:
        """As in a table."""
        kind = "" if self.groups == 1 else " depthwise" if self.groups == self.channels else f" {self.groups} groups"
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.k[0]}x{self.k[1]}{kind}{stride}"


def layers(width: int) -> list[Layer]:
    """Layers of a pyramid: channels grow as cells shrink, from `width` at 8 x 8."""
    pyramid = {b: width * 8 // b for b in (8, 4, 2, 1)}
    return [
        *(Layer((3, 3), 1, c, 1, b) for b, c in pyramid.items()),
        *(Layer((3, 3), 2, c, 1, b) for b, c in pyramid.items() if b > 1),
        *(Layer((2, 2), 2, c, 1, b) for b, c in pyramid.items() if b > 1),
        *(Layer((3, 3), 1, 2 * c, 32, b) for b, c in pyramid.items()),
        *(Layer((k, k), 1, 2 * c, 2 * c, b) for b, c in pyramid.items() for k in (3, 5, 7)),
        *(Layer((3, 3), 2, 2 * c, 2 * c, b) for b, c in pyramid.items() if b > 1),
        *(Layer((1, 11), 1, c, c, b) for b, c in pyramid.items()),
    ]


@dataclass
class Options:
    """What to measure."""

    masks: tuple[float, ...] = (0.0, 0.6, 0.75)
    widths: tuple[int, ...] = (64, 96)
    """channels at 8 x 8 cells per patch"""
    batch: int = 16
    patches: int = 7
    """patches per image side"""
    repeats: int = 5
    threads: int = 2
    device: str = "cpu"
    precision: str = "fp32"
    name: str = "conv_algorithms"
    """the result is kept as benchmarks/results/<name>.json"""


def algorithms(layer: Layer, kernels: bool) -> list[str]:
    """Those that can compute it."""
    reach = max(max(a.lo, a.hi) for a in layer_axes(module(layer)))
    possible = ["dense"]
    if reach <= layer.b:
        possible += ["halo", "im2col"] if layer.groups == 1 else ["halo"]
    return possible + ["direct"] * (kernels and layer.groups in (1, layer.channels))


def module(layer: Layer, device: str | None = None) -> nn.Conv2d:
    """The layer, padded to keep patches aligned."""
    ky, kx = (0 if k == layer.stride else k // 2 for k in layer.k)
    return nn.Conv2d(
        layer.channels, layer.channels, layer.k, layer.stride, (ky, kx), groups=layer.groups, device=device
    )


def measure(layer: Layer, ratio: float, options: Options) -> dict:
    """Seconds of every algorithm."""
    device = torch.device(options.device)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    conv = module(layer).to(device, dtype)
    kernels = use_kernels(None, conv.weight)
    patches = options.patches**2
    keep = max(1, round(patches * (1 - ratio)))
    index = sample_visible(0, 0, torch.arange(options.batch, device=device), (options.patches,) * 2, keep)
    visible = VisiblePatches(index, (options.patches,) * 2)
    shape = (visible.count, layer.channels, layer.b, layer.b)
    x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()

    def run(algorithm: str) -> Callable[[], tuple[float, ...]]:
        def timed() -> tuple[float, ...]:
            start = clock(device)
            y = convolve(x, conv.weight, conv.bias, layer_axes(conv), layer.groups, visible, algorithm, kernels)
            torch.autograd.grad(y, [x, conv.weight], torch.ones_like(y))
            return (clock(device) - start,)

        return timed

    seconds = {k: v[0] for k, v in medians({w: run(w) for w in algorithms(layer, kernels)}, options.repeats).items()}
    chosen = choose_algorithm(layer.b, layer_axes(conv), conv.weight, layer.groups, visible.ratio, kernels)
    best = min(seconds, key=seconds.__getitem__)
    return {
        **layer._asdict(),
        "layer": layer.text,
        "mask": ratio,
        "keep": visible.ratio,
        "seconds": seconds,
        "chosen": chosen,
        "best": best,
        "loss": seconds[chosen] / seconds[best],
    }


def show(rows: list[dict]) -> None:
    """Print the table."""
    table = Table(title="milliseconds, forward + backward")
    shown = [w for w in ("halo", "im2col", "dense", "direct") if any(w in row["seconds"] for row in rows)]
    for title in ("layer", "channels", "b", "mask", *shown, "chosen", "loss"):
        table.add_column(title, justify="right")
    for row in rows:
        each = [f"{row['seconds'][w] * 1e3:.3g}" if w in row["seconds"] else "" for w in shown]
        loss = f"[red]{row['loss']:.2f}" if row["loss"] > 1.1 else f"{row['loss']:.2f}"
        table.add_row(row["layer"], str(row["channels"]), str(row["b"]), str(row["mask"]), *each, row["chosen"], loss)
    Console(width=120).print(table)
    right = sum(row["loss"] <= 1.1 for row in rows)
    print(f"the chosen algorithm is within 10 % of the fastest for {right} of {len(rows)} layers")


def fitted(rows: list[dict], options: Options) -> GpuRates:
    """The rates whose costs are nearest to the measured seconds, by the mean square of the ratios' logarithms."""
    convs = [module(Layer(*(row[field] for field in Layer._fields)), "meta") for row in rows]
    per_b = options.batch * options.patches**2  # cells of the dense map, for patches of one cell
    rates = GPU_RATES._replace(element=2 if options.precision == "bf16" else 4)
    return fit_rates(rates, ("memory", "cache", "products", "grouped"), lambda r: misfit(r, rows, convs, per_b))


def misfit(rates: GpuRates, rows: list[dict], convs: list[nn.Conv2d], per_b: int) -> float:
    """The mean square, over layers, of the logarithms of measured seconds over those that the rates give."""
    total = 0.0
    for row, conv in zip(rows, convs, strict=True):
        costs = gpu_costs(row["b"], layer_axes(conv), conv.weight, conv.groups, row["keep"], True, rates)
        for name, cost in costs.items():
            total += math.log(row["seconds"][name] / (cost * per_b * row["b"] ** 2)) ** 2
    return total / len(rows)


def main(options: Options) -> None:
    """Measure every layer, print the table and keep the result."""
    torch.set_num_threads(options.threads)
    keep_heap()
    cases = list(itertools.product([layer for w in options.widths for layer in layers(w)], options.masks))
    rows = [measure(*case, options) for case in track(cases, "measuring")]
    show(rows)
    found = {}
    if options.device == "cuda":
        found = {"rates": fitted(rows, options)._asdict()}
        print("GpuRates(" + ", ".join(f"{name}={value:.3g}" for name, value in found["rates"].items()) + ")")
    where = machine(torch.device(options.device), options.threads)
    settings = {k: getattr(options, k) for k in ("batch", "patches", "repeats", "precision")}
    print(f"kept in {save(options.name, {'settings': settings, 'machine': where, 'rows': rows, **found})}")


if __name__ == "__main__":
    main(tyro.cli(Options))
