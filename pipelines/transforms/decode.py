"""Bytes to pixels: (H, W, 3) uint8 RGB, or a reason why not.

libjpeg-turbo (simplejpeg, which releases the GIL) decodes JPEGs, Pillow all the rest. JPEGs are judged strictly:
see `jpeg`. An orientation is not applied, in EXIF or TIFF, and alpha is dropped, both as in the published code.
"""

from __future__ import annotations

import io
import math
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.file_kinds import PAGE, UNKNOWN_PIXELS, not_read, other_kind, reason_of
from spark_fast.pipelines.transforms.jpeg import decode_jpeg
from spark_fast.pipelines.transforms.pillow_pixels import Loss, to_rgb
from spark_fast.pipelines.transforms.png_chunks import without_text

MEGAPIXEL = 2**20  # of --max_pixels
MAX_PIXELS = 64 * MEGAPIXEL  # a decompression bomb is refused from its header; 64 Mpx is 192 MiB as RGB

# Formats that Pillow decodes itself; left to guess, it would also start Ghostscript for an EPS.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")


class Decoded(NamedTuple):
    """A decoded image."""

    pixels: NDArray[np.uint8]  # (H, W, 3), RGB
    what: str | None  # None: a plain colour JPEG; else what it is, in words for the manifest of a conversion
    losses: tuple[Loss, ...] = ()  # what its pixels have lost

    @property
    def converted(self) -> bool:
        """Whether the file is anything other than a plain colour JPEG."""
        return self.what is not None


def decode_image(
    data: bytes | memoryview, max_pixels: int = MAX_PIXELS, *, fast_chroma: bool = False, judged: bool = False
) -> Decoded:
    """Decode one image, (H, W, 3) RGB.

    Args:
        max_pixels: larger images are refused.
        fast_chroma: repeat a JPEG's coarser chroma where it would be interpolated.
        judged: these bytes were decoded before.

    Raises:
        ImageError: the image is empty, damaged, too large or of no known kind; with the reason.
    """
    if not len(data):
        raise ImageError("the file has zero bytes")
    try:
        if bytes(data[:2]) == b"\xff\xd8":
            limit = partial(check_size, max_pixels=max_pixels)
            return Decoded(*decode_jpeg(data, limit, fast_chroma=fast_chroma, judged=judged))
        pixels, losses = _decode_with_pillow(data, max_pixels)
    except ImageError:
        raise
    except Exception as error:  # on hostile bytes a decoder raises nearly anything
        reason = reason_of(error)
        if (isinstance(error, UnidentifiedImageError) or reason in UNKNOWN_PIXELS) and (kind := other_kind(data)):
            raise ImageError(not_read(kind)) from error
        raise ImageError(f"not a readable image ({reason}); it starts with {bytes(data[:12])!r}") from error
    return Decoded(pixels, f"not a JPEG (it starts with {bytes(data[:8])!r}), stored as one", losses)


def _decode_with_pillow(data: bytes | memoryview, max_pixels: int) -> tuple[NDArray[np.uint8], tuple[Loss, ...]]:
    allow_pixels(max_pixels)
    with Image.open(io.BytesIO(without_text(data)), formats=_PILLOW_FORMATS) as image:
        check_size(image.height, image.width, max_pixels)
        return to_rgb(image)


def allow_pixels(max_pixels: int) -> None:
    """Let Pillow open images of so many pixels: it warns above its own limit, and refuses above twice that."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raise ImageError for an image without pixels, or with too many."""
    if not height * width:
        raise ImageError(f"{width} x {height} pixels are no image")
    if height * width > max_pixels:
        raise ImageError(
            f"{width} x {height} pixels exceed the limit of {max_pixels / 1e6:.0f} million:"
            f" --max_pixels {math.ceil(height * width / 1e6)} (train, eval, convert) reads it, see {PAGE}"
        )
