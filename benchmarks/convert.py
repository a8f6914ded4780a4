"""Images per second and core that the converter writes, beside FFCV's DatasetWriter, in one run.

    python benchmarks/convert.py

Both read the same ImageNet originals, reduce them to the same sizes and store them as JPEG of the same quality, one
process each, on one and the same core, in turn; a figure is the median. FFCV reads as its own ImageNet script does,
through torchvision's ImageFolder. Its field bounds the longer side alone, so each image is given the bound that makes
its stored size ours. Without FFCV the converter is measured alone.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from measuring import machine, medians, repeated, save, versions
from rich.console import Console
from rich.table import Table
from torchvision.datasets import ImageFolder

from pipelines.convert import ConvertSettings, convert
from pipelines.stored import StoredImages

Run = Callable[[], tuple[float, ...]]
LIBRARIES = ("simplejpeg", "pillow", "ffcv", "opencv-python")  # that do the work


@dataclass
class Options:
    """What to measure."""

    images: Path = Path(__file__).parents[2] / "shared" / "data" / "imagenet_sample" / "train"
    """class folders of originals"""
    copies: int = 6
    """how often each is converted in one measurement, so that it is long enough"""
    short_side: int = 256
    quality: int = 90
    repeats: int = 5
    name: str = "convert"
    """the result is kept as benchmarks/results/<name>.json"""


def ours(src: Path, dst: Path, stored: StoredImages) -> tuple[float, ...]:
    """Seconds of a conversion to shards: listing, images, checksums, index and manifest."""
    shutil.rmtree(dst, ignore_errors=True)
    start = time.perf_counter()
    convert(src, dst, ConvertSettings(stored), workers=1)
    return (time.perf_counter() - start,)


def ffcvs(stored: StoredImages) -> Callable[[Path, Path], tuple[float, ...]]:
    """The same by FFCV, to a .beton; ImportError when it is not installed."""
    os.environ["NUMBA_THREADING_LAYER"] = "workqueue"  # on one core, its TBB pool would wait forever at exit
    import cv2
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    cv2.setNumThreads(1)

    class SameSize(RGBImageField):
        """FFCV's field, with the longer side bounded to what ours stores of this image."""

        def encode(self, destination: Any, image: Any, malloc: Any) -> None:
            self.max_resolution = max(stored.size(image.height, image.width))
            super().encode(destination, image, malloc)

    def run(src: Path, dst: Path) -> tuple[float, ...]:
        dst.unlink(missing_ok=True)
        start = time.perf_counter()
        fields = {"image": SameSize(write_mode="jpg", jpeg_quality=stored.quality), "label": IntField()}
        DatasetWriter(str(dst), fields, num_workers=1).from_indexed_dataset(ImageFolder(str(src)))
        return (time.perf_counter() - start,)

    return run


def measure(options: Options) -> dict[str, Any]:
    """Images per second of each, and the ratio where there are two."""
    stored = StoredImages(options.short_side, 0, options.quality)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = repeated(options.images, options.copies, folder / "src")
        candidates: dict[str, Run] = {"spark_fast": partial(ours, folder / "src", folder / "shards", stored)}
        try:
            candidates["ffcv"] = partial(ffcvs(stored), folder / "src", folder / "images.beton")
        except ImportError as error:
            print(f"FFCV is not installed ({error}): the converter is measured alone")
        seconds = medians(candidates, options.repeats)
        rates: dict[str, Any] = {kind: count / times[0] for kind, times in seconds.items()}
        sizes = {"spark_fast": sum(path.stat().st_size for path in (folder / "shards").glob("*.tar"))}
        if "ffcv" in rates:
            sizes["ffcv"] = (folder / "images.beton").stat().st_size
    rows = [
        {"writer": kind, "images_per_second_and_core": rate, "kilobytes_per_image": sizes[kind] / count / 1e3}
        for kind, rate in rates.items()
    ]
    return {"images": count, "rows": rows, "ratio": rates["spark_fast"] / rates["ffcv"] if "ffcv" in rates else None}


def main(options: Options) -> None:
    """Measure, print the table and keep the result."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # children inherit it: both writers have this one core
    torch.set_num_threads(1)
    result = measure(options)
    table = Table(title=f"{result['images']} ImageNet originals to shorter side {options.short_side}, one core")
    for title in ("writer", "images/s", "kB/image"):
        table.add_column(title, justify="right")
    for row in result["rows"]:
        table.add_row(row["writer"], *(f"{row[k]:.0f}" for k in ("images_per_second_and_core", "kilobytes_per_image")))
    console = Console(width=100)
    console.print(table)
    if result["ratio"]:
        console.print(f"ratio [bold]{result['ratio']:.2f}x")
    settings = {k: getattr(options, k) for k in ("copies", "short_side", "quality", "repeats")}
    where = machine(torch.device("cpu"), 1) | versions(LIBRARIES)
    print(f"kept in {save(options.name, {'settings': settings, 'machine': where, **result})}")


if __name__ == "__main__":
    main(tyro.cli(Options))
