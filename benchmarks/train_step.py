"""Seconds of a whole training step and of its encoder, for every way to compute them.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --masks 0.6 0.75 --batches 16 --parts encoder

The candidates have the same weights, images and masks and take turns; a figure is the median. A step is forward,
backward, clipping and the method's optimiser, eager. "published decoder" is the masked encoder with images as planes
(NCHW) in fp32, and for SparK dense projections and each layer of the decoder by itself: how the published code
computes, though leaner than that code. Below it the decoder is today's, and without "NCHW" the layout channels_last.
Steps are compared with the first candidate, encoders with the masked one of the same precision and layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import tyro
from measuring import clock, machine, medians, save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from ways import Shape, Way, build, inputs, train_step

from spark_fast.encoder import VisiblePatches
from spark_fast.reporting.mfu import is_emulated, matmul_rate
from spark_fast.run.malloc import keep_heap
from spark_fast.training.step import DTYPES

NCHW = torch.contiguous_format
CANDIDATES = {
    "masked fp32 NCHW, published decoder": Way("masked", "fp32", NCHW, plain_decoder=True),
    "masked fp32 NCHW": Way("masked", "fp32", NCHW),
    "masked fp32": Way("masked", "fp32"),
    "packed fp32": Way("packed", "fp32"),
    "masked bf16": Way("masked", "bf16"),
    "packed bf16": Way("packed", "bf16"),
}


@dataclass
class Options:
    """What to measure."""

    models: tuple[str, ...] = ("resnet50", "convnext_small")
    batches: tuple[int, ...] = (8,)
    masks: tuple[float, ...] = (0.6,)
    candidates: tuple[str, ...] = tuple(CANDIDATES)
    """names from the table"""
    parts: tuple[Literal["encoder", "step"], ...] = ("encoder", "step")
    methods: tuple[str, ...] = ("spark",)
    masks_per_image: tuple[int, ...] = (1,)
    size: int = 224
    width: int | None = None
    """of the decoder; None: the method's own"""
    repeats: int = 5
    threads: int = 2
    """CPU threads"""
    device: str = "cpu"
    name: str = "train_step"
    """the result is kept as benchmarks/results/<name>.json"""


def candidate(way: Way, shape: Shape, options: Options) -> Callable[[], tuple[float, ...]]:
    """Seconds of (the encoder forward and backward, the step, its optimiser); 0 for what is not measured."""
    device = torch.device(options.device)
    model = build(way, shape, device)
    images, visible = inputs(model, shape, way, device)
    advance, dtype = train_step(way, model, device), DTYPES[way.precision]

    def encode() -> float:
        start = clock(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features = model.encoder(images, VisiblePatches(visible, model.grid))
        torch.autograd.backward(features, [torch.ones_like(f) for f in features])
        seconds = clock(device) - start
        model.zero_grad()
        return seconds

    def step() -> tuple[float, float]:
        start = clock(device)
        advance(1, images, visible)
        return clock(device) - start, advance.clock.read()["optimizer"]

    return lambda: (
        encode() if "encoder" in options.parts else 0.0,
        *(step() if "step" in options.parts else (0.0, 0.0)),
    )


def measure(shape: Shape, options: Options) -> list[dict]:
    """A row for each candidate."""
    runs = {name: candidate(CANDIDATES[name], shape, options) for name in options.candidates}
    seconds = medians(runs, options.repeats)
    return [
        {"method": shape.method, "model": shape.model, "batch": shape.batch, "mask": shape.mask}
        | {"masks": shape.masks, "candidate": name}
        | dict(zip(("encoder", "step", "optimizer"), seconds[name], strict=True))
        for name in options.candidates
    ]


def table(rows: list[dict], options: Options) -> Table:
    """The rows, with what each is beside the one it is compared with."""
    shown = Table(title=f"seconds, {options.size} px")
    titles = ("method", "network", "batch", "mask", "masks", "how")
    for title in (*titles, "encoder", "ratio", "step", "ratio", "clipping and update"):
        shown.add_column(title, justify="right")
    names = ("method", "model", "batch", "mask", "masks")
    by_name = {(*(row[name] for name in names), row["candidate"]): row for row in rows}
    for row in rows:
        where = tuple(row[name] for name in names)
        peer = by_name.get((*where, row["candidate"].replace("packed", "masked")), row)
        first = by_name.get((*where, options.candidates[0]), row)
        encoder = [f"{row['encoder']:.2f}", f"{peer['encoder'] / row['encoder']:.2f}x"] if row["encoder"] else ["", ""]
        step = [f"{row['step']:.2f}", f"{first['step'] / row['step']:.2f}x"] if row["step"] else ["", ""]
        share = f"{row['optimizer'] / row['step']:.1%}" if row["step"] else ""
        shown.add_row(*map(str, where), row["candidate"], *encoder, *step, share)
    return shown


def main(options: Options) -> None:
    """Measure every combination, print the table and keep the result.

    Raises:
        SystemExit: a candidate that is none.
    """
    if unknown := set(options.candidates) - set(CANDIDATES):
        raise SystemExit(f"no such candidate: {', '.join(unknown)}; there are {', '.join(CANDIDATES)}")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    keep_heap()
    rates = {name: matmul_rate(device, DTYPES[name]) / 2e9 for name in ("fp32", "bf16")}
    if is_emulated(rates["bf16"], rates["fp32"]) and options.candidates == tuple(CANDIDATES):
        print(f"without bf16, which this device has no instructions for: {rates} billion multiply-adds a second")
        native = tuple(name for name, way in CANDIDATES.items() if way.precision != "bf16")
        options = replace(options, candidates=native)
    each = (options.methods, options.models, options.masks, options.masks_per_image, options.batches)
    shapes = [
        Shape(model, options.size, mask, batch, options.width, method, masks)
        for method, model, mask, masks, batch in itertools.product(*each)
    ]
    rows = [row for shape in track(shapes, "measuring") for row in measure(shape, options)]
    Console(width=140).print(table(rows, options))
    where = machine(device, options.threads) | {"billion multiply-adds a second in a matrix product": rates}
    settings = {"size": options.size, "repeats": options.repeats, "decoder_width": options.width}
    print(f"kept in {save(options.name, {'settings': settings, 'machine': where, 'rows': rows})}")


if __name__ == "__main__":
    main(tyro.cli(Options))
