"""What checking every record costs: seconds of a checksum beside those of reading, decoding and resizing an image.

    python benchmarks/checksums.py --data_path SHARDS

One thread, every image of a converted folder from a warm cache, 224 px, the best of `--repeats` passes that take turns.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from measuring import machine

from spark_fast.pipelines.backends.image_loader import ImageLoader
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.transforms.crops import DRAWS, Augmentation


def measure(data_path: Path, repeats: int = 7) -> None:
    """Print microseconds an image, and the share of the checksum."""
    torch.set_num_threads(1)
    source = detect_source(data_path)
    images = [source.read(i) for i in range(len(source))]
    loader, draws = ImageLoader(source, Augmentation()), [0.5] * DRAWS
    out = torch.empty(224, 224, 3, dtype=torch.uint8)

    def seconds(work: Callable[[int], object]) -> float:
        start = time.perf_counter()
        for i in range(len(source)):
            work(i)
        return (time.perf_counter() - start) / len(source)

    passes = [
        (
            seconds(lambda i: loader.load(i, draws, out)),
            seconds(lambda i: zlib.crc32(images[i])),
        )
        for _ in range(repeats)
    ]
    whole, check = (min(times) for times in zip(*passes, strict=True))
    print(machine(torch.device("cpu"), 1))
    print(f"{len(source)} images: {1e6 * whole:.0f} us an image, of which the checksum {1e6 * check:.1f} us: "
          f"{check / whole:.1%}")  # fmt: skip


if __name__ == "__main__":
    tyro.cli(measure, use_underscores=True, description=__doc__)
