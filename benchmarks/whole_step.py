"""Seconds of a whole training step beside the published way of computing it, and the optimiser's share of them.

    python benchmarks/whole_step.py

Three candidates with the same weights, images and masks take turns: the masked encoder in fp32 with images as planes
(NCHW), dense projections and each layer of the decoder by itself, which is how the published code computes, though
leaner than that code; and the packed encoder, channels_last, in fp32 and in bf16, with the decoder's layers merged and
its projections taken from the visible cells where that pays. A step is forward, backward, clipping and LAMB. A figure
is the median.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from measuring import clock, machine, medians, save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from ways import decode_as_published

from spark_fast import build_spark
from spark_fast.masking import num_visible, sample_visible
from spark_fast.training.heap import keep_heap
from spark_fast.training.optim import build_optimizer
from spark_fast.training.step import Schedule, TrainStep

CANDIDATES = {  # name: (encoder, precision, layout)
    "masked fp32 NCHW": ("masked", "fp32", torch.contiguous_format),
    "packed fp32": ("packed", "fp32", torch.channels_last),
    "packed bf16": ("packed", "bf16", torch.channels_last),
}


@dataclass
class Options:
    """What to measure."""

    models: tuple[str, ...] = ("resnet50", "convnext_small")
    batches: tuple[int, ...] = (8, 16)
    mask: float = 0.6
    size: int = 224
    repeats: int = 5
    threads: int = 2
    """CPU threads"""
    device: str = "cpu"
    name: str = "whole_step"
    """the result is kept as benchmarks/results/<name>.json"""


def stepper(name: str, model: str, batch: int, options: Options, state: dict) -> Callable[[], tuple[float, ...]]:
    """Seconds of (the step, its optimiser)."""
    encoder, precision, layout = CANDIDATES[name]
    device = torch.device(options.device)
    spark = build_spark(model, input_size=options.size, mask_ratio=options.mask, encoder=encoder)
    if encoder == "masked":
        decode_as_published(spark)
    spark.load_state_dict(state or spark.state_dict())
    state.update(copy.deepcopy(spark.state_dict()))
    spark.to(device, memory_format=layout).train()  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, options.size, options.size, generator=generator)
    images = images.to(device).contiguous(memory_format=layout)
    keep = num_visible(spark.grid, options.mask)
    visible = sample_visible(0, 0, torch.arange(batch, device=device), spark.grid, keep)
    schedule = Schedule(1e-6, 0, 1000, 0.04, 0.2)
    optimizer = build_optimizer("lamb", spark, 0.95)
    advance = TrainStep(spark, optimizer, schedule, precision=precision, device=device, clip=5.0)

    def run() -> tuple[float, ...]:
        start = clock(device)
        advance(1, images, visible)
        return clock(device) - start, advance.clock.read()["optimizer"]

    return run


def measure(model: str, batch: int, options: Options) -> list[dict]:
    """A row for each candidate."""
    state: dict = {}
    candidates = {name: stepper(name, model, batch, options, state) for name in CANDIDATES}
    seconds = medians(candidates, options.repeats)
    slow = seconds["masked fp32 NCHW"][0]
    return [
        {"model": model, "batch": batch, "candidate": name, "step": step, "optimizer": optimizer, "ratio": slow / step}
        for name, (step, optimizer) in seconds.items()
    ]


def main(options: Options) -> None:
    """Measure every combination, print the table and keep the result."""
    torch.set_num_threads(options.threads)
    keep_heap()
    pairs = [(model, batch) for model in options.models for batch in options.batches]
    rows = [row for pair in track(pairs, "measuring") for row in measure(*pair, options)]
    table = Table(title=f"seconds of a step, {options.size} px, mask {options.mask}")
    for title in ("network", "batch", "how", "step", "beside the first", "optimiser", "of the step"):
        table.add_column(title, justify="right")
    for row in rows:
        times = [f"{row['step']:.2f}", f"{row['ratio']:.2f}x", f"{row['optimizer']:.3f}"]
        share = f"{row['optimizer'] / row['step']:.1%}"
        table.add_row(row["model"], str(row["batch"]), row["candidate"], *times, share)
    Console(width=120).print(table)
    where = machine(torch.device(options.device), options.threads)
    settings = {"size": options.size, "mask": options.mask, "repeats": options.repeats}
    print(f"kept in {save(options.name, {'settings': settings, 'machine': where, 'rows': rows})}")


if __name__ == "__main__":
    main(tyro.cli(Options))
