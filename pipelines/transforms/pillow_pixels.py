"""Pillow's images, of every mode, as (H, W, 3) uint8 RGB, and what is lost on the way.

Training takes three channels of 8 bits. Deeper pixels keep their upper 8 bits, and a band beside the
colours is dropped. Both may go unnoticed (12 bits stored in 16 are nearly black, near infrared stored as alpha is
gone), so each image says what it lost; `losses` counts and tells it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.file_kinds import UNKNOWN_PIXELS, not_read

DARK = 16  # of 255: 12 bits stored in 16 lie below

_BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _EXTRA, _FORMAT = 258, 262, 277, 284, 338, 339  # tags of TIFF
_COLOUR_BANDS = {2: 3, 5: 4, 6: 3, 8: 3}  # of a TIFF, by its photometric interpretation; otherwise 1
_WHITE_IS_ZERO = 0  # such an interpretation

_UPPER = "only their upper 8 bits are read"
_CUT_OFF = "values below 0 become 0, those above 65535 that, and of 16 bits only the upper 8 are read"
_DROPPED = "it is dropped as transparency"
_DIVIDED = "the colours are divided by it, as it is said to be transparency, and it is dropped"
_RESCALE = "rescale them first, or train with --in_chans 1, which reads them whole"
_RESCALE_COLOUR = "rescale them first, or train with --scale dtype, which reads them whole"
_CHOOSE = (
    "if it holds data, such as near infrared, choose three bands first, or train with as many --in_chans as there are"
)


class Loss(NamedTuple):
    """What the pixels of some images lose when they become RGB of 8 bits."""

    kind: str  # "16-bit grey (I;16)"
    lost: str  # "only the upper 8 bits are read"
    remedy: str
    dark: bool = False  # this image has no pixel as bright as DARK


def to_rgb(image: Image.Image) -> tuple[NDArray[np.uint8], tuple[Loss, ...]]:
    """Pixels of a Pillow image of any mode, its first frame as stored, (H, W, 3) uint8; and what was lost.

    Raises ImageError for floating point numbers, and what Pillow raises for damaged files.
    """
    if image.mode == "F":
        raise ImageError(not_read("one of floating point numbers of unknown range (F)"))
    depth, band, raw = _depth(image), _further_bands(image), _coding(image)[1]
    if _is_misread(image, deep=depth is not None):
        raise ValueError(UNKNOWN_PIXELS[1])
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) if image.format == "TIFF" else 1
    if image.mode.startswith("I"):  # 16 bits and more; Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.int64)
        values = values & 0xFFFFFFFF if raw == "I;32N" else values  # Pillow has no unsigned 32 bits
        grey = (values.clip(0, 65535) >> 8).astype(np.uint8)
        pixels = np.repeat(grey[:, :, None], 3, axis=2)  # (H, W) -> (H, W, 3)
    else:
        if image.mode == "La" or (image.mode == "P" and "transparency" in image.info):
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        pixels = np.array(image.convert("RGB"))
    if depth:
        depth = depth._replace(dark=bool(pixels.max() < DARK))
    if band and band.kind[-2] == "A" and image.getchannel("A").getextrema() == (255, 255):
        band = None  # opaque everywhere: nothing is lost
    return _as_stored(pixels, turned), tuple(filter(None, (depth, band)))


def _depth(image: Image.Image) -> Loss | None:
    """What an image that is not loaded yet loses of its bits, `dark` aside; None: nothing."""
    codec, raw = _coding(image)
    if image.mode.startswith("I"):
        if not (raw.endswith("S") or raw.startswith("I;32")):
            return Loss("16-bit grey (I;16)", _UPPER, _RESCALE)
        return Loss(f"{'32-bit' if raw.startswith('I;32') else 'signed 16-bit'} grey (I)", _CUT_OFF, _RESCALE)
    if image.format == "TIFF":
        if image.mode == "L" and _tag(image, _FORMAT, 1)[0] == 2:
            return Loss("signed 8-bit grey (L)", "values below 0 become 128 to 255", _RESCALE)
        deep = max(_tag(image, _BITS, 1)) > 8
    else:
        deep = (image.format == "PNG" and ";16" in raw) or (codec.startswith("ppm") and int(raw.split()[-1]) > 255)
    return Loss(f"16-bit colour ({image.mode};16)", _UPPER, _RESCALE_COLOUR) if deep else None


def _coding(image: Image.Image) -> tuple[str, str]:
    """Pillow's names of the decoder and of the pixels' layout in the file; PPM's largest value is the last word."""
    tiles = getattr(image, "tile", [])
    if not tiles:  # WebP
        return "", image.mode
    codec, _, _, args = tiles[0]
    return codec, args if isinstance(args, str) else " ".join(map(str, args[: 2 if codec.startswith("ppm") else 1]))


def _further_bands(image: Image.Image) -> Loss | None:
    """What an image loses of its bands, if these are not opaque everywhere; None: nothing."""
    mode = image.mode
    further = int(mode.endswith(("A", "a")))
    if image.format == "TIFF":
        plain_bands = _COLOUR_BANDS.get(_tag(image, _PHOTOMETRIC, 1)[0], 1)
        further = max(_tag(image, _SAMPLES, 1)[0] - plain_bands, further)
    if not further:
        return None
    colours = {"L": "grey", "I": "grey", "P": "a palette", "C": "CMYK"}.get(mode[0], "RGB")
    if further > 1:
        return Loss(f"{colours} with {further} more bands", "these are dropped", _CHOOSE)
    place = {"CMYK": "fifth", "RGB": "fourth"}.get(colours, "second")
    plain = mode.rstrip("Aa")
    lost = _DIVIDED if _coding(image)[1].startswith(("La", "RGBa")) else _DROPPED
    return Loss(f"{colours} with a {place} band ({plain}{'A' if plain != mode else 'X'})", lost, _CHOOSE)


def _is_misread(image: Image.Image, deep: bool) -> bool:
    """Whether Pillow (13.0) makes other pixels of a TIFF than it holds; only of some with one band after the other."""
    if image.format != "TIFF" or _tag(image, _PLANAR, 1)[0] != 2:
        return False
    if _coding(image)[0] == "raw":  # a band is taken for plain bytes
        return deep or _tag(image, _PHOTOMETRIC, 1)[0] == _WHITE_IS_ZERO
    return image.mode == "RGBA" and not _tag(image, _EXTRA, ())  # the colours are divided by the fourth band


def _tag(image: Image.Image, number: int, default: int | tuple[int, ...]) -> tuple[int, ...]:
    """The values of a TIFF's tag."""
    found = image.tag_v2.get(number, default)  # type: ignore[attr-defined]
    return found if isinstance(found, tuple) else (found,)


def _as_stored(pixels: NDArray[np.uint8], turned: int) -> NDArray[np.uint8]:
    """Undo what Pillow does to a TIFF, and to no other format: turn it by its `turned`, the tag of its orientation."""
    undo: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
        2: np.fliplr,
        3: lambda p: np.rot90(p, 2),
        4: np.flipud,
        5: lambda p: p.swapaxes(0, 1),
        6: np.rot90,
        7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
        8: lambda p: np.rot90(p, -1),
    }
    return np.ascontiguousarray(undo[turned](pixels)) if turned in undo else pixels
