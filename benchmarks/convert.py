"""Images per second and core that the converter writes, beside FFCV's DatasetWriter, in one run.

    python benchmarks/convert.py

Both read the same ImageNet originals, reduce them to the same sizes and store them as JPEG of the same quality, one
process each, on one and the same core, in turn; a figure is the median. By the clock, and by the processor's time,
which other work on that core hardly touches and which leaves out what a writer waits: ours for the disk, FFCV's on its
progress bar. FFCV reads as its own ImageNet script does, through torchvision's ImageFolder. Its field bounds the longer
side alone, so each image is given the bound that makes its stored size ours. Without FFCV the converter is measured
alone.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
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

from spark_fast.pipelines.convert.conversion import ConvertSettings, convert
from spark_fast.pipelines.convert.reencode import Reencode

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


def ours(src: Path, dst: Path, stored: Reencode) -> None:
    """A conversion to shards: listing, images, checksums, index and manifest."""
    convert(src, dst, ConvertSettings(stored), workers=1)


def ffcvs(stored: Reencode) -> Callable[[Path, Path], None]:
    """The same by FFCV, to a .beton in the folder; ImportError when it is not installed."""
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

    def run(src: Path, dst: Path) -> None:
        fields = {"image": SameSize(write_mode="jpg", jpeg_quality=stored.quality), "label": IntField()}
        DatasetWriter(str(dst / "images.beton"), fields, num_workers=1).from_indexed_dataset(ImageFolder(str(src)))
        for child in multiprocessing.active_children():  # the writer leaves it: its time counts when it is gone
            child.join()

    return run


def timed(write: Callable[[Path, Path], None], src: Path, dst: Path) -> tuple[float, ...]:
    """Seconds by the clock, and of the processor (children included), of writing `src` to an empty folder `dst`."""
    shutil.rmtree(dst, ignore_errors=True)
    dst.mkdir()
    start, used = time.perf_counter(), processor_seconds()
    write(src, dst)
    return time.perf_counter() - start, processor_seconds() - used


def processor_seconds() -> float:
    """Of this process and of its children that are gone."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(options: Options) -> dict[str, Any]:
    """Images per second of each, and the ratios where there are two."""
    stored = Reencode(options.short_side, 0, options.quality)
    writers: dict[str, Callable[[Path, Path], None]] = {"spark_fast": partial(ours, stored=stored)}
    try:
        writers["ffcv"] = ffcvs(stored)
    except ImportError as error:
        print(f"FFCV is not installed ({error}): the converter is measured alone")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = repeated(options.images, options.copies, folder / "src")
        candidates: dict[str, Callable[[], tuple[float, ...]]] = {
            kind: partial(timed, write, folder / "src", folder / kind) for kind, write in writers.items()
        }
        seconds = medians(candidates, options.repeats)
        written = {kind: sum(path.stat().st_size for path in (folder / kind).iterdir()) for kind in writers}
    rows = [
        {
            "writer": kind,
            "images_per_second_and_core": count / by_clock,
            "images_per_processor_second": count / of_processor,
            "kilobytes_per_image": written[kind] / count / 1e3,
        }
        for kind, (by_clock, of_processor) in seconds.items()
    ]
    ratios = (
        [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)] if "ffcv" in seconds else [None] * 2
    )
    return {"images": count, "rows": rows, "ratio": ratios[0], "ratio_of_processor_time": ratios[1]}


def main(options: Options) -> None:
    """Measure, print the table and keep the result."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # children inherit it: both writers have this one core
    torch.set_num_threads(1)
    result = measure(options)
    table = Table(title=f"{result['images']} ImageNet originals to shorter side {options.short_side}, one core")
    for title in ("writer", "images/s", "images/processor s", "kB/image"):
        table.add_column(title, justify="right")
    for writer, *figures in (row.values() for row in result["rows"]):
        table.add_row(writer, *(f"{figure:.0f}" for figure in figures))
    console = Console(width=100)
    console.print(table)
    if result["ratio"]:
        console.print(
            f"ratio [bold]{result['ratio']:.2f}x[/], {result['ratio_of_processor_time']:.2f}x of processor time"
        )
    settings = {k: getattr(options, k) for k in ("copies", "short_side", "quality", "repeats")}
    where = machine(torch.device("cpu"), 1) | versions(LIBRARIES)
    print(f"kept in {save(options.name, {'settings': settings, 'machine': where, **result})}")


if __name__ == "__main__":
    main(tyro.cli(Options))
