"""Make a small set of images that are no photographs, to try the project on: two classes, in train/ and val/.

    python tools/make_bands.py scans scans

The classes differ in structure alone, in any channel: `stripes` are waves of one direction, `grid` of two that cross.
Both have any direction, width and brightness, so neither level nor orientation tells them apart. An image depends on
its number alone.

    scans        1 channel, 12 bits stored in 16: .png
    aerial       4 channels of 8 bits: .png
    satellites   12 channels of 16 bits: scenes, .tif in compressed tiles
    microscopy   5 channels of float32: .npy, (C, H, W)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import imagecodecs
import numpy as np
import tifffile
import tyro
from numpy.typing import NDArray

CLASSES = ("grid", "stripes")
CHANNELS = {"scans": 1, "aerial": 4, "satellites": 12, "microscopy": 5}


@dataclass
class Options:
    """What to make."""

    kind: Annotated[Literal["scans", "aerial", "satellites", "microscopy"], tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]
    """a new folder"""
    train: int = 192
    """images to train on (of satellites, which are cut into 16 tiles each, a sixteenth)"""
    val: int = 64
    """validation images, likewise"""
    side: int = 64
    """pixels; of a scene four times as many"""


def structure(number: int, crossed: bool, side: int, channels: int) -> NDArray[np.float64]:
    """(side, side, channels) about 0, in [-1, 1] but for some noise."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:side, :side]
    angle, width = rng.uniform(0, np.pi), rng.uniform(1.5, 2.5)
    waves = [
        np.sin((x * np.cos(a) + y * np.sin(a)) / width + rng.uniform(0, 2 * np.pi)) for a in (angle, angle + np.pi / 2)
    ]
    pattern = waves[0] * waves[1] if crossed else waves[0] / np.sqrt(2)  # of equal deviation
    strength = rng.uniform(0.5, 1, channels) * rng.choice([-1, 1], channels)
    return pattern[:, :, None] * strength + rng.normal(0, 0.1, (side, side, channels))


def image(kind: str, number: int, crossed: bool, side: int) -> NDArray:
    """One image in the numbers of its kind, (side, side, channels)."""
    level = np.random.default_rng(-number - 1 + 2**32).uniform(0.4, 0.6)
    values = level + 0.3 * structure(number, crossed, side, CHANNELS[kind])
    if kind == "microscopy":
        return (100 * values).astype(np.float32)
    largest, dtype = {"scans": (4095, "uint16"), "aerial": (255, "uint8"), "satellites": (10_000, "uint16")}[kind]
    return (values.clip(0, 1) * largest).astype(dtype)


def write(kind: str, path: Path, pixels: NDArray) -> None:
    """In the kind's format; `path` has no ending."""
    if kind == "satellites":
        layout = {"planarconfig": "contig", "tile": (64, 64), "compression": "zlib", "photometric": "minisblack"}
        tifffile.imwrite(path.with_suffix(".tif"), pixels, **layout)  # type: ignore[arg-type]
    elif kind == "microscopy":
        np.save(path.with_suffix(".npy"), np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    else:
        plain = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
        path.with_suffix(".png").write_bytes(imagecodecs.png_encode(plain))


def make(options: Options) -> None:
    """Write the images."""
    fewer, larger = (16, 4) if options.kind == "satellites" else (1, 1)
    for first, split, count in ((0, "train", options.train), (10**6, "val", options.val)):
        for i in range(max(count // fewer, 2)):
            path = options.out / split / CLASSES[i % 2] / f"{i:04d}"
            path.parent.mkdir(parents=True, exist_ok=True)
            write(options.kind, path, image(options.kind, first + i, i % 2 == 0, options.side * larger))
    print(f"{options.out}: {options.kind} of {CHANNELS[options.kind]} channels, in two classes")


if __name__ == "__main__":
    make(tyro.cli(Options))
