"""Seconds per step of the packed encoder beside the masked one, in one run, as ratios.

    python benchmarks/train_step.py

For each network, precision and mask ratio: the encoder alone (forward, backward) and the whole training step
(forward, backward, clipping and optimiser). Both encoders have the same weights, images and masks, are channels_last,
eager, and alternate; a figure is the median. The heap is kept as in training, for both.
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
from torch import Tensor

from spark_fast import SparK, build_spark
from spark_fast.encoder import Visible
from spark_fast.masking import num_visible, sample_visible
from spark_fast.training.heap import keep_heap
from spark_fast.training.optim import build_optimizer
from spark_fast.training.step import DTYPES, Schedule, TrainStep


@dataclass
class Options:
    """What to measure."""

    models: tuple[str, ...] = ("resnet50", "convnext_small")
    precisions: tuple[str, ...] = ("fp32", "bf16")
    masks: tuple[float, ...] = (0.6, 0.75)
    size: int = 224
    batch: int = 16
    repeats: int = 5
    """measurements of each figure; the whole step takes half as many"""
    threads: int = 2
    """CPU threads"""
    device: str = "cpu"
    name: str = "train_step"
    """the result is kept as benchmarks/results/<name>.json"""


def encoder_only(model: SparK, images: Tensor, visible: Tensor, dtype: torch.dtype) -> Callable[[], tuple[float, ...]]:
    """Seconds of (forward, backward) of the encoder."""

    def run() -> tuple[float, ...]:
        start = clock(images.device)
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            features = model.encoder(images, Visible(visible, model.grid))
        middle = clock(images.device)
        torch.autograd.backward(features, [torch.ones_like(f) for f in features])
        end = clock(images.device)
        model.zero_grad()
        return middle - start, end - middle

    return run


def whole_step(model: SparK, images: Tensor, visible: Tensor, precision: str) -> Callable[[], tuple[float, ...]]:
    """Seconds of one training step with LAMB."""
    schedule = Schedule(1e-6, 0, 1000, 0.04, 0.2)
    optimizer = build_optimizer("lamb", model, 0.95)
    step = TrainStep(model, optimizer, schedule, precision=precision, device=images.device, clip=5.0)

    def run() -> tuple[float, ...]:
        start = clock(images.device)
        step(1, images, visible)
        return (clock(images.device) - start,)

    return run


def measure(name: str, precision: str, ratio: float, options: Options) -> dict:
    """One row: packed and masked, the same weights, images and masks."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = build_spark(name, input_size=options.size, mask_ratio=ratio)
    masked = build_spark(name, input_size=options.size, mask_ratio=ratio, encoder="masked")
    masked.load_state_dict(copy.deepcopy(model.state_dict()))
    both = {"packed": model, "masked": masked}
    for m in both.values():
        m.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    keep = num_visible(model.grid, ratio)
    visible = sample_visible(0, 0, torch.arange(options.batch, device=device), model.grid, keep)
    encoders = {k: encoder_only(m, images, visible, DTYPES[precision]) for k, m in both.items()}
    encoder = medians(encoders, options.repeats)
    steps = {k: whole_step(m, images, visible, precision) for k, m in both.items()}
    step = medians(steps, max(2, options.repeats // 2))
    row: dict = {"model": name, "precision": precision, "mask": ratio}
    for kind in both:
        row[f"{kind}_forward"], row[f"{kind}_backward"] = encoder[kind]
        row[f"{kind}_step"] = step[kind][0]
    row["encoder_ratio"] = sum(encoder["masked"]) / sum(encoder["packed"])
    row["step_ratio"] = row["masked_step"] / row["packed_step"]
    return row


def show(rows: list[dict], options: Options) -> None:
    """Print the table."""
    table = Table(
        title=f"seconds, batch {options.batch}, {options.size} px; encoder forward + backward, and whole step"
    )
    for title in ("network", "precision", "mask", "packed encoder", "masked encoder", "ratio"):
        table.add_column(title, justify="right")
    for title in ("packed step", "masked step", "ratio"):
        table.add_column(title, justify="right")
    for row in rows:
        parts = {k: f"{row[f'{k}_forward']:.2f} + {row[f'{k}_backward']:.2f}" for k in ("packed", "masked")}
        ratios = [f"[bold]{row[k]:.2f}x" for k in ("encoder_ratio", "step_ratio")]
        numbers = [parts["packed"], parts["masked"], ratios[0]]
        numbers += [f"{row['packed_step']:.2f}", f"{row['masked_step']:.2f}", ratios[1]]
        table.add_row(row["model"], row["precision"], str(row["mask"]), *numbers)
    Console(width=130).print(table)


def main(options: Options) -> None:
    """Measure every combination, print the table and keep the result."""
    torch.set_num_threads(options.threads)
    keep_heap()
    combinations = [(m, p, r) for m in options.models for p in options.precisions for r in options.masks]
    rows = [measure(*combination, options) for combination in track(combinations, "measuring")]
    show(rows, options)
    settings = {"size": options.size, "batch": options.batch, "repeats": options.repeats}
    where = machine(torch.device(options.device), options.threads)
    print(f"kept in {save(options.name, {'settings': settings, 'machine': where, 'rows': rows})}")


if __name__ == "__main__":
    main(tyro.cli(Options))
