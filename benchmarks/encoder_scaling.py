"""How time and memory of the packed encoder follow the visible share of an image; table, plot, JSON.

    python benchmarks/encoder_scaling.py

Time: forward and backward at several mask ratios, alternating, medians, as a share of the time at ratio 0. Memory: the
peak of what the encoder allocates in a forward and backward pass beyond parameters and their gradients, and what
autograd keeps between the two; packed as a share of masked, at mask 0.6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from measuring import clock, machine, medians, save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.autograd.profiler import profile

from spark_fast.encoder import Encoder, MaskedEncoder, PackedEncoder, VisiblePatches
from spark_fast.masking import num_visible, sample_visible
from spark_fast.networks import build_network
from spark_fast.run.malloc import keep_heap

PLOT = Path(__file__).parents[1] / "docs" / "pictures" / "encoder_scaling.png"


@dataclass
class Options:
    """What to measure."""

    models: tuple[str, ...] = ("resnet50", "convnext_small")
    masks: tuple[float, ...] = (0.0, 0.25, 0.5, 0.6, 0.75, 0.9)
    size: int = 224
    batch: int = 16
    repeats: int = 5
    threads: int = 2
    device: str = "cpu"
    name: str = "encoder_scaling"
    """the result is kept as benchmarks/results/<name>.json"""


def visible(encoder: Encoder, ratio: float, options: Options) -> VisiblePatches:
    """A batch of masks."""
    grid = (options.size // encoder.patch,) * 2
    keep = grid[0] * grid[1] if ratio == 0 else num_visible(grid, ratio)
    return VisiblePatches(sample_visible(0, 0, torch.arange(options.batch, device=options.device), grid, keep), grid)


def run(encoder: Encoder, images: Tensor, seen: VisiblePatches) -> None:
    """Forward and backward."""
    features = encoder(images, VisiblePatches(seen.index, seen.grid))  # tables are made anew every step
    torch.autograd.backward(features, [torch.ones_like(f) for f in features])
    encoder.zero_grad()


def timed(encoder: Encoder, images: Tensor, seen: VisiblePatches) -> Callable[[], tuple[float, ...]]:
    """A candidate for `medians`."""

    def one() -> tuple[float, ...]:
        start = clock(images.device)
        run(encoder, images, seen)
        return (clock(images.device) - start,)

    return one


def kept(encoder: Encoder, images: Tensor, seen: VisiblePatches) -> int:
    """Bytes that autograd keeps from forward to backward, parameters excepted."""
    own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    sizes: dict[int, tuple[int, Tensor]] = {}

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            sizes[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        encoder(images, seen)
    return sum(n for n, _ in sizes.values())


def peak(encoder: Encoder, images: Tensor, seen: VisiblePatches) -> int:
    """The most bytes allocated at once in forward and backward, gradients of parameters not counted."""
    for parameter in encoder.parameters():  # so that gradients are there before and only added to
        parameter.grad = torch.zeros_like(parameter)
    if images.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(encoder, images, seen)
        return torch.cuda.max_memory_allocated() - before
    with profile(use_cpu=True, profile_memory=True) as recorded:
        features = encoder(images, VisiblePatches(seen.index, seen.grid))
        torch.autograd.backward(features, [torch.ones_like(f) for f in features])
    now = most = 0
    events = sorted(recorded.kineto_results.events(), key=lambda e: e.start_ns())
    for event in (e for e in events if e.name() == "[memory]"):
        now += event.nbytes()
        most = max(most, now)
    encoder.zero_grad()
    return most


def measure(name: str, options: Options) -> dict:
    """One network: seconds by mask ratio, bytes of both encoders at 0.6."""
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    images = images.contiguous(memory_format=torch.channels_last)
    encoders = {}
    for kind in (PackedEncoder, MaskedEncoder):
        made = kind(build_network(name), (options.size, options.size)).to(options.device)
        encoders[kind.__name__] = made.to(memory_format=torch.channels_last).train()
    packed, masked = encoders.values()
    candidates = {str(r): timed(packed, images, visible(packed, r, options)) for r in options.masks}
    seconds = {float(r): t[0] for r, t in medians(candidates, options.repeats).items()}
    seen = visible(packed, 0.6, options)
    memory = {
        k: {"kept": kept(e, images, seen), "peak": peak(e, images, seen)}
        for k, e in (("packed", packed), ("masked", masked))
    }
    return {
        "model": name,
        "seconds": seconds,
        "share": {r: t / seconds[options.masks[0]] for r, t in seconds.items()},
        "memory": memory,
        "memory_share": {k: memory["packed"][k] / memory["masked"][k] for k in ("kept", "peak")},
    }


def show(rows: list[dict], options: Options) -> None:
    """Print the table."""
    table = Table(title=f"packed encoder, batch {options.batch}, {options.size} px: time as a share of mask 0")
    for title in ("network", *(f"mask {r}" for r in options.masks), "memory kept", "memory peak"):
        table.add_column(title, justify="right")
    for row in rows:
        memory = [f"{row['memory_share'][k]:.2f} of masked" for k in ("kept", "peak")]
        table.add_row(row["model"], *(f"{row['share'][r]:.2f}" for r in options.masks), *memory)
    Console(width=130).print(table)


def draw(rows: list[dict], path: Path) -> None:
    """Time against the visible share."""
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", label="the visible share")
    for row in rows:
        axes.plot([1 - r for r in row["share"]], list(row["share"].values()), marker="o", label=row["model"])
    axes.set(
        xlabel="visible share of the image", ylabel="time, share of that at mask 0", xlim=(0, 1.02), ylim=(0, 1.05)
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(options: Options) -> None:
    """Measure every network, print the table, draw the plot and keep the result."""
    torch.set_num_threads(options.threads)
    keep_heap()
    rows = [measure(name, options) for name in track(options.models, "measuring")]
    show(rows, options)
    if options.name == Options.name:
        draw(rows, PLOT)
    where = machine(torch.device(options.device), options.threads)
    settings = {k: getattr(options, k) for k in ("size", "batch", "repeats")}
    print(f"kept in {save(options.name, {'settings': settings, 'machine': where, 'rows': rows})}")


if __name__ == "__main__":
    main(tyro.cli(Options))
