"""Make the images of `learning.py --form evidence_scans`: one channel of 16 bits, no photographs, in ten classes.

    python benchmarks/learning_scans.py /tmp/scans

An image is a slice of a body that does not exist: a smooth background, some organs (ellipses of any size and level),
the noise of a detector, and one to three findings of one shape, which is the class. Place, angle, size and contrast of
a finding say nothing of the class, nor does anything else in the image. An image depends on its number alone.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import imagecodecs
import numpy as np
import tyro
from numpy.typing import NDArray

SIDE = 64  # pixels
TEST = 10**7  # the number of the first test image
Field = NDArray[np.float64]


def _box(u: Any, v: Any, width: float, height: float) -> Any:
    """Below 0 inside of a box of these half sides about (0, 0)."""
    return np.maximum(abs(u) - width, abs(v) - height)


# each below 0 inside, for coordinates of which about [-1, 1] is the finding
SHAPES = {
    "disc": lambda u, v: np.hypot(u, v) - 0.8,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.75) - 0.2,
    "square": lambda u, v: _box(u, v, 0.7, 0.7),
    "frame": lambda u, v: abs(_box(u, v, 0.65, 0.65)) - 0.18,
    "triangle": lambda u, v: np.maximum(-v - 0.5, abs(u) * 0.87 + v * 0.5 - 0.5),
    "cross": lambda u, v: np.minimum(_box(u, v, 0.9, 0.28), _box(u, v, 0.28, 0.9)),
    "bar": lambda u, v: _box(u, v, 1.1, 0.32),
    "two bars": lambda u, v: _box(u, abs(v) - 0.55, 1.0, 0.22),
    "angle": lambda u, v: np.minimum(_box(u, v + 0.6, 0.9, 0.26), _box(u + 0.64, v, 0.26, 0.86)),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.75 - np.hypot(u - 0.45, v)),
}
CLASSES = tuple(SHAPES)


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


def scan(number: int, shape: str) -> NDArray[np.uint16]:
    """(SIDE, SIDE), the whole range of 16 bits, mean about its half."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    slope = rng.uniform(-0.1, 0.1, 2)
    values = 0.5 + slope[0] * (x / SIDE - 0.5) + slope[1] * (y / SIDE - 0.5)
    for _ in range(rng.integers(3, 7)):
        organ = _placed(rng, x, y, SIDE * rng.uniform(0.1, 0.35))
        values += rng.uniform(-0.12, 0.12) * _inside(np.hypot(organ[0], organ[1] * rng.uniform(1, 2)) - 1, 2.0)
    for _ in range(rng.integers(1, 4)):
        size = rng.uniform(5, 9)
        finding = _inside(SHAPES[shape](*_placed(rng, x, y, size)), 0.7 / size)
        values += rng.uniform(0.08, 0.2) * rng.choice((-1, 1)) * finding
    values += rng.normal(0, rng.uniform(0.01, 0.03), values.shape)
    return (values.clip(0, 1) * 65535).round().astype(np.uint16)


def _placed(rng: np.random.Generator, x: Field, y: Field, size: float) -> tuple[Field, Field]:
    """The pixels in coordinates of a thing of this size in pixels, at any place and angle."""
    (left, top), angle = rng.uniform(0.15 * SIDE, 0.85 * SIDE, 2), rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle) / size, np.sin(angle) / size
    return (x - left) * cos + (y - top) * sin, (y - top) * cos - (x - left) * sin


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
        path = folder / CLASSES[label].replace(" ", "-") / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            made = path.with_suffix(".partial")
            made.write_bytes(imagecodecs.png_encode(scan(first + i * len(CLASSES) + label, CLASSES[label])))
            made.replace(path)


if __name__ == "__main__":
    make(tyro.cli(Options, description=__doc__))
