"""Make the images of `learning.py --form evidence_scans`: one channel of 16 bits, no photographs, in ten classes.

    python benchmarks/learning_scans.py /tmp/scans

An image is a slice of a body that does not exist: a smooth background, some organs (ellipses of any size and level),
the noise of a detector, and a region of tissue. The class is the tissue's texture: one of five grain sizes, as round
cells or as fibres. Place, size, contrast, and the fibres' direction say nothing of the class, nor does anything else
in the image. An image depends on its number alone.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import imagecodecs
import numpy as np
import tyro
from numpy.typing import NDArray

SIDE = 64  # pixels
TEST = 10**7  # the number of the first test image
Field = NDArray[np.float64]


GRAINS = (3.5, 5.0, 7.0, 10.0, 14.0)  # pixels from cell to cell, or from fibre to fibre
CLASSES = tuple(f"{kind}-{grain:g}" for grain in GRAINS for kind in ("cells", "fibres"))


@dataclass
class Options:
    """What to make."""

    out: Annotated[Path, tyro.conf.Positional]
    """a new folder"""
    train: int = 2000
    """training images of each class"""
    test: int = 200
    """test images of each class"""
    processes: int = 2


def scan(number: int, label: int) -> NDArray[np.uint16]:
    """(SIDE, SIDE), the whole range of 16 bits, mean about its half."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    slope = rng.uniform(-0.1, 0.1, 2)
    values = 0.5 + slope[0] * (x / SIDE - 0.5) + slope[1] * (y / SIDE - 0.5)
    for _ in range(rng.integers(3, 7)):
        values += rng.uniform(-0.1, 0.1) * _ellipse(rng, x, y, rng.uniform(0.1, 0.35), rng.uniform(1, 2), 2.0)
    region = _ellipse(rng, x, y, rng.uniform(0.35, 0.6), 1, 0.6)
    values += rng.uniform(0.08, 0.16) * region * _texture(rng, GRAINS[label // 2], fibres=label % 2 == 1)
    values += rng.normal(0, rng.uniform(0.01, 0.03), values.shape)
    return (values.clip(0, 1) * 65535).round().astype(np.uint16)


def _texture(rng: np.random.Generator, grain: float, *, fibres: bool) -> Field:
    """(SIDE, SIDE), deviation 1: white noise, filtered to a ring of frequencies, and for fibres to one direction."""
    across, along = np.meshgrid(*[np.fft.fftfreq(SIDE)] * 2)
    frequency = np.exp(rng.normal(0, 0.08)) / grain
    passed = np.exp(-0.5 * ((np.hypot(across, along) - frequency) / (0.25 * frequency)) ** 2)
    if fibres:
        turned = np.angle(np.exp(2j * (np.arctan2(along, across) - rng.uniform(0, np.pi)))) / 2
        passed *= np.exp(-0.5 * (turned / 0.25) ** 2)
    texture = np.fft.ifft2(passed * np.fft.fft2(rng.normal(size=passed.shape))).real
    return texture / texture.std()


def _ellipse(rng: np.random.Generator, x: Field, y: Field, size: float, aspect: float, softness: float) -> Field:
    """About 1 inside and 0 outside of an ellipse at any place and angle; `size` as a share of the image's side."""
    (left, top), angle = rng.uniform(0.15 * SIDE, 0.85 * SIDE, 2), rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle) / (size * SIDE), np.sin(angle) / (size * SIDE)
    u, v = (x - left) * cos + (y - top) * sin, (y - top) * cos - (x - left) * sin
    return _inside(np.hypot(u, aspect * v) - 1, softness)


def _inside(distance: Field, softness: float) -> Field:
    """1 inside, 0 outside, and between them where `distance` is about 0."""
    return 1 / (1 + np.exp((4 / softness * distance).clip(-50, 50)))


def make(options: Options) -> None:
    """Write the images that are missing, in train/ and test/."""
    for split, first, count in (("train", 0, options.train), ("test", TEST, options.test)):
        with ProcessPoolExecutor(options.processes) as pool:
            list(pool.map(partial(_write_class, options.out / split, first, count), range(len(CLASSES))))


def _write_class(folder: Path, first: int, count: int, label: int) -> None:
    for i in range(count):
        path = folder / CLASSES[label] / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            made = path.with_suffix(".partial")
            made.write_bytes(imagecodecs.png_encode(scan(first + i * len(CLASSES) + label, label)))
            made.replace(path)


if __name__ == "__main__":
    make(tyro.cli(Options, description=__doc__))
