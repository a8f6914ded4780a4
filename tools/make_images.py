"""Make a small image folder to try the project on: natural-looking pictures, in ImageNet's layout.

    python tools/make_images.py pictures --train 512 --val 64

The pictures follow the dead leaves model (Lee, Mumford and Huang 2001): objects that occlude one another, their
sizes drawn with density 1/r^3, which gives the scale invariance and the edges of photographs. Colours come from a
palette, shapes from a family; a class is a pair of the two. A picture depends on the seed and its number alone,
so the files are the same with any number of processes. Stopped, the same command goes on; finished, it says so.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from rich.progress import track

RECIPE = "made_by_make_images.json"  # in DST: what the folder was made with
TEXTURE = 512  # pixels, side of the texture tiles

PALETTES = {
    "forest": ("#1f2d1a", "#3c5a2a", "#6f8f3f", "#a9b86a", "#5b4630", "#d8cfa6"),
    "autumn": ("#3b1f14", "#8c3b1b", "#c9702b", "#e3b04b", "#6b6a3a", "#efe0c0"),
    "sea": ("#0f2a3d", "#1f5673", "#4b93a8", "#9cc9cf", "#e6e3d3", "#c98d5b"),
    "desert": ("#4a2f22", "#9a6a45", "#cfa271", "#e9d3ab", "#7f8fa0", "#b5563a"),
    "berries": ("#2a1226", "#6d1f3c", "#b23a57", "#dd8a93", "#45592f", "#f0dcd0"),
    "stone": ("#23262b", "#4f5358", "#82857f", "#b4b1a5", "#dedad0", "#7a5a48"),
    "meadow": ("#2f4a1f", "#7da13b", "#c8c84e", "#f1e38b", "#8a5fa0", "#f4f1e6"),
    "dusk": ("#171a33", "#3d3560", "#7e4f7d", "#c9747c", "#f0ab7c", "#5f7fa3"),
}
SHAPES = ("ellipses", "leaves", "polygons", "slabs")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the pictures."""

    train: int
    val: int
    classes: int
    size: int
    seed: int

    def class_name(self, label: int) -> str:
        """Palette and shape of a class, numbered so that names sort as labels do."""
        palette = list(PALETTES)[label % len(PALETTES)]
        return f"{label:03d}_{palette}_{SHAPES[self.shape(label)]}"

    def shape(self, label: int) -> int:
        """Index in SHAPES; shifted each time the palettes begin again, so that the pair is new."""
        return (label + label // len(PALETTES)) % len(SHAPES)

    def files(self) -> list[tuple[str, int, str]]:
        """(split, number, path below DST) of every picture."""
        return [
            (split, i, f"{split}/{self.class_name(i % self.classes)}/{split}_{i:06d}.JPEG")
            for split, count in (("train", self.train), ("val", self.val))
            for i in range(count)
        ]


def make_images(dst: Path, recipe: Recipe, workers: int) -> int:
    """Write what is missing of the pictures into DST; returns how many that were.

    Raises:
        ValueError: DST holds something else.
    """
    _claim(dst, recipe)
    missing = [file for file in recipe.files() if not (dst / file[2]).exists()]
    for folder in {(dst / path).parent for _, _, path in missing}:
        folder.mkdir(parents=True, exist_ok=True)
    if missing:
        make = functools.partial(_make_file, dst, recipe)
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(workers, len(missing)), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            done = pool.imap_unordered(make, missing, chunksize=4)
            for _ in track(done, f"making {dst}", total=len(missing), disable=not sys.stderr.isatty()):
                pass
    return len(missing)


def _claim(dst: Path, recipe: Recipe) -> None:
    """Only a new or empty folder, or one that was begun with this very recipe, is written to."""
    note = dst / RECIPE
    if note.is_file():
        found = json.loads(note.read_text(encoding="utf-8"))
        if found != asdict(recipe):
            raise ValueError(f"{dst} was made with other arguments ({found}): choose another folder")
        return
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst} exists and was not made by make_images.py: choose another folder")
    dst.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(asdict(recipe)) + "\n", encoding="utf-8")


def _make_file(dst: Path, recipe: Recipe, file: tuple[str, int, str]) -> None:
    split, number, name = file
    rng = np.random.default_rng([recipe.seed, ("train", "val").index(split), number])
    picture = paint(rng, number % recipe.classes, recipe)
    unfinished = dst / f"{name}.partial"
    picture.save(unfinished, format="JPEG", quality=92)
    unfinished.rename(dst / name)  # a picture that exists is whole


def paint(rng: np.random.Generator, label: int, recipe: Recipe) -> Image.Image:
    """One picture of a class: layers of shapes from far to near, then light, lens and sensor."""
    short, aspect = recipe.size * rng.uniform(0.9, 1.15), rng.uniform(1, 1.5)
    sides = round(short), round(short * aspect)
    height, width = sides if rng.random() < 0.7 else sides[::-1]
    palette = _palette(rng, list(PALETTES.values())[label % len(PALETTES)])
    canvas = _ground(rng, palette, height, width)
    shape, light = recipe.shape(label), rng.uniform(-math.pi, 0)  # the light comes from above
    radii = np.sort(_radii(rng, 80, 0.08 * short, 0.7 * short))[::-1]
    # Large ones tend to be far, as a wall is behind a cup; noise keeps some of them in front.
    depth = np.argsort(-np.log(radii) + rng.normal(0, 0.8, len(radii)))
    for i, radius in enumerate(radii[depth]):
        if i == len(radii) // 4:
            canvas = _blurred(canvas, rng.uniform(0.5, 2.5))  # the background is out of focus
        kind = shape if rng.random() < 0.75 else int(rng.integers(len(SHAPES)))
        _add_shape(canvas, rng, kind, radius, _colour(rng, palette), light)
    canvas = _lit(canvas, rng, light)
    canvas = _blurred(canvas, rng.uniform(0.35, 0.7))
    canvas += rng.normal(0, rng.uniform(0.004, 0.014), canvas.shape).astype(np.float32)
    return Image.fromarray((canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8))


def _radii(rng: np.random.Generator, count: int, least: float, most: float) -> np.ndarray:
    """Radii with density 1/r^3 between the two limits, by inverting the distribution function."""
    uniform = rng.random(count)
    return (least**-2 - uniform * (least**-2 - most**-2)) ** -0.5


def _palette(rng: np.random.Generator, colours: tuple[str, ...]) -> np.ndarray:
    """The palette as this picture has it: (colours, 3) in [0, 1], under its own tint, each jittered a little."""
    base = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours]) / 255
    tint = rng.normal(1, 0.06, 3) * rng.uniform(0.85, 1.15)
    return (base * tint + rng.normal(0, 0.03, base.shape)).clip(0.02, 0.98).astype(np.float32)


def _colour(rng: np.random.Generator, palette: np.ndarray) -> np.ndarray:
    """Between two of the palette's colours, mostly near one of them."""
    i, j = rng.integers(len(palette), size=2)
    share = rng.beta(0.6, 2)
    return palette[i] * (1 - share) + palette[j] * share + rng.normal(0, 0.02, 3).astype(np.float32)


def _ground(rng: np.random.Generator, palette: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width, 3): a slope from one colour to another, with texture."""
    slope = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    canvas = _colour(rng, palette) * (1 - slope) + _colour(rng, palette) * slope
    return canvas * (1 + 0.25 * _texture(rng, height, width)[..., None])


@functools.cache
def _textures() -> np.ndarray:
    """Tiles (n, TEXTURE, TEXTURE) of 1/f noise that repeat without a seam, zero mean and unit deviation."""
    rng = np.random.default_rng(0)
    fy, fx = np.fft.fftfreq(TEXTURE)[:, None], np.fft.rfftfreq(TEXTURE)[None, :]
    tiles = []
    # exponent of the spectrum, and stretch: clouds, stone, wood grain, fine sand
    for power, stretch in ((1.5, 1), (1.1, 1), (1.2, 7), (0.6, 1)):
        frequency = np.hypot(fy * stretch, fx)
        frequency[0, 0] = np.inf
        white = np.fft.rfft2(rng.standard_normal((TEXTURE, TEXTURE)))
        tile = np.fft.irfft2(white / np.maximum(frequency, 2 / TEXTURE) ** power, (TEXTURE, TEXTURE))
        tiles.append((tile - tile.mean()) / tile.std())
    return np.stack(tiles).astype(np.float32)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(height, width): a random cut of a random tile, upright or on its side."""
    tiles = _textures()
    tile = tiles[rng.integers(len(tiles))]
    tile = tile.T if rng.random() < 0.5 else tile
    top, left = rng.integers(TEXTURE, size=2)
    if top + height <= TEXTURE and left + width <= TEXTURE:
        return tile[top : top + height, left : left + width]
    return np.take(np.take(tile, range(top, top + height), 0, mode="wrap"), range(left, left + width), 1, mode="wrap")


def _add_shape(
    canvas: np.ndarray, rng: np.random.Generator, kind: int, radius: float, colour: np.ndarray, light: float
) -> None:
    """Paint one shape and its shadow over the canvas, in place. Its edge is one pixel of blending."""
    height, width = canvas.shape[:2]
    y0, x0 = rng.uniform(0, height), rng.uniform(0, width)
    turn, squeeze, reach = rng.uniform(0, 2 * math.pi), rng.uniform(0.45, 1), radius * 1.5 + 2
    details = rng.uniform(0.8, 1.2, 8)
    contrast, roundness, gradient = rng.uniform(0.03, 0.14), rng.uniform(0, 0.45), rng.uniform(0.05, 0.3)
    top, bottom = max(int(y0 - reach), 0), min(int(y0 + reach) + 1, height)
    left, right = max(int(x0 - reach), 0), min(int(x0 + reach) + 1, width)
    y = (np.arange(top, bottom, dtype=np.float32) - np.float32(y0))[:, None] / np.float32(radius)
    x = (np.arange(left, right, dtype=np.float32) - np.float32(x0))[None, :] / np.float32(radius)
    cos, sin = np.float32(math.cos(turn)), np.float32(math.sin(turn))
    u, v = cos * x + sin * y, (cos * y - sin * x) / np.float32(squeeze)
    inside = _field(kind, u, v, details)  # 1 at the centre, 0 on the outline, falling outwards
    part = canvas[top:bottom, left:right]
    soft = np.float32(0.16)
    shadow = ((inside + soft) / soft).clip(0, 1)
    part *= (1 - 0.35 * shadow * shadow)[..., None]
    towards_light = np.float32(math.cos(light)) * x + np.float32(math.sin(light)) * y
    shade = 1 + gradient * towards_light - roundness * (1 - inside.clip(0, 1)) ** 2 + roundness / 3
    shade = shade + contrast * _texture(rng, bottom - top, right - left)
    alpha = (inside * np.float32(radius * squeeze) + 0.5).clip(0, 1)[..., None]
    part += alpha * (shade[..., None] * colour.astype(np.float32) - part)


def _field(kind: int, u: np.ndarray, v: np.ndarray, details: np.ndarray) -> np.ndarray:
    """How far inside the shape each point (u, v) lies, in units of its radius."""
    if SHAPES[kind] == "ellipses":
        return 1 - np.sqrt(u * u + v * v)
    if SHAPES[kind] == "leaves":  # where two circles overlap: pointed at both ends
        offset = np.float32(0.6 * details[0])
        side = np.abs(v) + offset
        return (1.25 - np.sqrt(u * u + side * side)) / (1.25 - offset)
    if SHAPES[kind] == "slabs":  # a rectangle with round corners
        corner = np.float32(0.25 * details[0])
        du, dv = np.abs(u) - 0.95 + corner, np.abs(v) - 0.8 + corner
        outside = np.hypot(np.maximum(du, 0), np.maximum(dv, 0))
        return corner - outside - np.minimum(np.maximum(du, dv), 0)
    corners = 3 + int(details[0] * 1000) % 5  # a polygon: the nearest of its sides decides
    angles = 2 * math.pi * (np.arange(corners) + details[1 : 1 + corners] * 0.5) / corners
    inside = None
    for angle, distance in zip(angles, details[::-1], strict=False):
        side = np.float32(0.75 * distance) - np.float32(math.cos(angle)) * u - np.float32(math.sin(angle)) * v
        inside = side if inside is None else np.minimum(inside, side)
    assert inside is not None
    return inside


def _lit(canvas: np.ndarray, rng: np.random.Generator, light: float) -> np.ndarray:
    """Light that falls off across the picture, and darker corners."""
    height, width = canvas.shape[:2]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    fall = 1 + rng.uniform(0, 0.25) * (math.cos(light) * x + math.sin(light) * y) - 0.12 * (x * x + y * y)
    return canvas * fall[..., None].astype(np.float32)


def _blurred(canvas: np.ndarray, radius: float) -> np.ndarray:
    """A Gaussian blur; by way of bytes, whose rounding the sensor's noise covers."""
    picture = Image.fromarray((canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 2 arguments, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dst", type=Path, metavar="DST", help="the output folder: new, empty, or made by this command")
    parser.add_argument("--train", type=int, default=512, help="number of training pictures (%(default)s)")
    parser.add_argument("--val", type=int, default=64, help="number of validation pictures (%(default)s)")
    parser.add_argument("--classes", type=int, default=8, help="number of classes (%(default)s)")
    parser.add_argument("--size", type=int, default=256, help="approximate shorter side in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="number of processes; 0: one per core")
    args = parser.parse_args(argv)
    if min(args.train, args.classes, args.size) < 1 or min(args.val, args.seed, args.workers) < 0:
        parser.error("--train, --classes and --size must be at least 1, the others at least 0")
    recipe = Recipe(args.train, args.val, args.classes, args.size, args.seed)
    try:
        made = make_images(args.dst, recipe, args.workers or len(os.sched_getaffinity(0)))
    except (ValueError, OSError) as error:
        print(f"make_images: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_images: interrupted. The same command continues.", file=sys.stderr)
        return 130
    total = args.train + args.val
    print(f"{args.dst}: {total} pictures, {f'{made} of them made now' if made else 'all made earlier'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
