"""What several masks of one image cost a step, and what they give where the loader is the limit.

    python benchmarks/masks_per_image.py --model resnet50

A pair is an image and a mask. First steps of equally many pairs, one mask of K*B images beside K masks of B images, in
turn: the seconds of a pair. Then steps whose batches come from a loader that takes `--slower` times as long as a step:
the pairs of a second, with one mask an image and with K, from batches of equally many images.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import tyro
from measuring import machine, medians, save
from rich.console import Console
from rich.table import Table
from ways import Shape, Way, build, inputs, train_step

from spark_fast.run.malloc import keep_heap


@dataclass
class Options:
    """What to measure."""

    model: str = "resnet50"
    method: str = "fcmae"
    masks: int = 4
    """K"""
    mask_ratio: float = 0.75
    batch: int = 2
    """B, images"""
    size: int = 224
    slower: float = 1.5
    """time of the throttled loader for a batch, over that of a step of K masks"""
    steps: int = 8
    repeats: int = 5
    threads: int = 2
    name: str = "masks_per_image"
    """the result is kept as benchmarks/results/<name>.json"""


class Arm:
    """Steps of `masks` masks of each of `images` images."""

    def __init__(self, options: Options, images: int, masks: int) -> None:
        way, device = Way("packed", "fp32"), torch.device("cpu")
        shape = Shape(options.model, options.size, options.mask_ratio, images, None, options.method, masks)
        model = build(way, shape, device)
        self.pairs, self.batch = images * masks, inputs(model, shape, way, device)
        self._advance = train_step(way, model, device)

    def step(self) -> tuple[float]:
        """Seconds."""
        begun = time.perf_counter()
        self._advance(1, *self.batch)
        return (time.perf_counter() - begun,)

    def behind(self, seconds: float, steps: int) -> float:
        """Pairs a second behind a loader that takes `seconds` a batch, one batch ahead."""
        batches = throttled(seconds, steps)
        next(batches)
        begun = time.perf_counter()
        for _ in batches:
            self.step()
        return self.pairs * (steps - 1) / (time.perf_counter() - begun)


def throttled(seconds: float, count: int) -> Iterator[None]:
    """A loader that prepares the next batch, for so many seconds, while one is computed."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(time.sleep, seconds)
        for number in range(count):
            coming.result()
            if number + 1 < count:
                coming = pool.submit(time.sleep, seconds)
            yield


def main(options: Options) -> None:
    """Measure, print the table and keep the result."""
    torch.set_num_threads(options.threads)
    keep_heap()
    k, b = options.masks, options.batch
    one, several = Arm(options, k * b, 1), Arm(options, b, k)
    found = medians({"one": one.step, "several": several.step}, options.repeats)
    cost = {name: seconds / (k * b) for name, (seconds,) in found.items()}
    wait, single = options.slower * found["several"][0], Arm(options, b, 1)
    runs = [(single.behind(wait, options.steps), several.behind(wait, options.steps)) for _ in range(3)]
    pairs = [statistics.median(column) for column in zip(*runs, strict=True)]
    table = Table(title=f"{options.method}, {options.model}, mask {options.mask_ratio:g}")
    for title in ("masks an image", "images decoded for a pair", "ms a pair", "pairs/s behind a slow loader"):
        table.add_column(title, justify="right")
    table.add_row("1", "1", f"{1000 * cost['one']:.1f}", f"{pairs[0]:.2f}")
    table.add_row(f"{k}", f"1/{k}", f"{1000 * cost['several']:.1f}", f"{pairs[1]:.2f}")
    Console().print(table)
    print(f"a pair costs {cost['several'] / cost['one']:.3f} times as much; {pairs[1] / pairs[0]:.2f} times the pairs")
    result = {
        "machine": machine(torch.device("cpu"), options.threads),
        "settings": vars(options),
        "seconds_a_pair": cost,
        "pairs_a_second_behind_a_slow_loader": dict(zip(("one", "several"), pairs, strict=True)),
    }
    print(f"kept in {save(options.name, result)}")


if __name__ == "__main__":
    main(tyro.cli(Options))
