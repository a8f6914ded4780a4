"""Size and speed of the lossless formats a record of a shard could have: .npy, .png and .tif.

    python benchmarks/record_formats.py

The images are waves with a little noise, 256 x 256, of as many channels and of the numbers that such images have; 16
bits hold 12, as scanners and satellites deliver them. Times are of one thread's processor: other work does not count.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import imagecodecs
import numpy as np
import tifffile
import torch
import tyro
from measuring import machine, medians, save, versions
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

KINDS = [(1, "uint8"), (4, "uint8"), (12, "uint8"), (1, "uint16"), (4, "uint16"), (12, "uint16")]
KINDS += [(1, "float32"), (4, "float32"), (12, "float32")]


@dataclass
class Options:
    """How much to measure."""

    side: int = 256
    images: int = 4
    repeats: int = 5
    name: str = "record_formats"
    """the result is kept as benchmarks/results/<name>.json"""


@dataclass(frozen=True)
class Format:
    """A way to write an image (H, W, C), and to read it again."""

    write: Callable[[NDArray], bytes]
    read: Callable[[bytes], NDArray]
    channels: tuple[int, ...] = (1, 4, 12)
    dtypes: tuple[str, ...] = ("uint8", "uint16", "float32")


def write_npy(pixels: NDArray) -> bytes:
    """NumPy's own."""
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return buffer.getvalue()


def write_tiff(pixels: NDArray, **options: Any) -> bytes:
    """One page; channels beside each other, as they lie in memory."""
    buffer = io.BytesIO()
    plain = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    layout: dict[str, Any] = {} if plain.ndim == 2 else {"planarconfig": "contig"}
    tifffile.imwrite(buffer, plain, photometric="minisblack", metadata=None, **layout, **options)
    return buffer.getvalue()


def read_tiff(data: bytes) -> NDArray:
    """By tifffile, in one thread."""
    return tifffile.imread(io.BytesIO(data), maxworkers=1)


OF_PNG = (1, 4), ("uint8", "uint16")  # channels and numbers that it can hold
FORMATS = {
    ".npy": Format(write_npy, lambda data: np.load(io.BytesIO(data))),
    ".png": Format(lambda image: bytes(imagecodecs.png_encode(image)), imagecodecs.png_decode, *OF_PNG),
    ".tif": Format(write_tiff, read_tiff),
    ".tif, zlib": Format(partial(write_tiff, compression="zlib", predictor=True), read_tiff),
    ".tif, zstd": Format(partial(write_tiff, compression="zstd", predictor=True), read_tiff),
}


def picture(seed: int, side: int, channels: int, dtype: str) -> NDArray:
    """Waves and noise of a hundredth of their size, (side, side, channels); 12 bits of a uint16."""
    rng = np.random.default_rng(seed)
    y, x, c = np.ogrid[:side, :side, :channels]
    values = 0.5 + 0.4 * np.sin(x / (9 + c)) * np.cos(y / (7 + seed + c)) + rng.normal(0, 0.01, (side, side, channels))
    if dtype == "float32":
        return values.astype(np.float32)
    return (values.clip(0, 1) * (4095 if dtype == "uint16" else 255)).astype(dtype)


def measure(options: Options, channels: int, dtype: str) -> list[dict]:
    """A row a format: share of the raw bytes, and milliseconds an image to write and to read."""
    pictures = [picture(seed, options.side, channels, dtype) for seed in range(options.images)]
    taking_part = {n: f for n, f in FORMATS.items() if channels in f.channels and dtype in f.dtypes}

    def work(format: Format) -> tuple[float, ...]:
        start = time.thread_time()
        files = [format.write(image) for image in pictures]
        written = time.thread_time()
        found = [format.read(data) for data in files]
        end = time.thread_time()
        assert all((a.reshape(b.shape) == b).all() for a, b in zip(found, pictures, strict=True))
        share = sum(map(len, files)) / sum(image.nbytes for image in pictures)
        return share, (written - start) / len(files) * 1e3, (end - written) / len(files) * 1e3

    candidates: dict[str, Callable[[], tuple[float, ...]]] = {
        name: partial(work, format) for name, format in taking_part.items()
    }
    return [
        {"channels": channels, "dtype": dtype, "format": name, "share": share, "write_ms": write, "read_ms": read}
        for name, (share, write, read) in medians(candidates, options.repeats).items()
    ]


def main(options: Options) -> None:
    """Measure every format on every kind of image, print the table and keep the result."""
    rows = [row for kind in KINDS for row in measure(options, *kind)]
    table = Table(title=f"{options.side} x {options.side}: share of the raw bytes; ms to write, to read")
    for heading in ("channels", "numbers", "format", "share", "write", "read"):
        table.add_column(heading)
    for r in rows:
        figures = (f"{r['share']:.2f}", f"{r['write_ms']:.2f}", f"{r['read_ms']:.2f}")
        table.add_row(str(r["channels"]), r["dtype"], r["format"], *figures)
    Console(width=100).print(table)
    where = machine(torch.device("cpu"), 1) | {"versions": versions(("numpy", "tifffile", "imagecodecs"))}
    settings = {"side": options.side, "images": options.images, "repeats": options.repeats}
    print(f"kept in {save(options.name, {'settings': settings, 'machine': where, 'rows': rows})}")


if __name__ == "__main__":
    main(tyro.cli(Options))
