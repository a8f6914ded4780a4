"""Bytes to pixels: (H, W, 3) uint8 RGB, or a reason why not.

libjpeg-turbo (simplejpeg, which releases the GIL) decodes every JPEG, Pillow all the rest. JPEGs are
decoded *strictly*: where libjpeg would only warn and go on with grey blocks (file cut short, bad Huffman
code), the image is refused, because nobody would see the grey. An orientation is not applied, in EXIF or TIFF, and
alpha is dropped, both as in the published code.
"""

from __future__ import annotations

import io
import math
import re
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.file_kinds import PAGE, UNKNOWN_PIXELS, not_read, other_kind
from spark_fast.pipelines.transforms.pillow_pixels import Loss, to_rgb

MEGAPIXEL = 2**20  # of --max_pixels
MAX_PIXELS = 64 * MEGAPIXEL  # a decompression bomb is refused from its header; 64 Mpx is 192 MiB as RGB

# Formats that Pillow decodes itself; left to guess, it would also start Ghostscript for an EPS.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
# libjpeg's warnings about headers alone; the pixels are whole.
_HARMLESS = re.compile(r"unknown JFIF revision|Unknown Adobe color transform|Invalid SOS parameters")

# In Pillow's messages; a conversion lists reasons, and the same image must give the same.
_ADDRESS = re.compile(r" <_io.BytesIO object at 0x[0-9a-f]+>")


class Decoded(NamedTuple):
    """A decoded image."""

    pixels: NDArray[np.uint8]  # (H, W, 3), RGB
    converted: bool  # the file is anything other than a colour JPEG
    losses: tuple[Loss, ...] = ()  # what of it became no pixels


def decode(
    data: bytes | memoryview, max_pixels: int = MAX_PIXELS, *, fast_chroma: bool = False
) -> tuple[NDArray[np.uint8], bool]:
    """Decode one image: its pixels, and whether they were converted; see `decode_image`."""
    return decode_image(data, max_pixels, fast_chroma=fast_chroma)[:2]


def decode_image(data: bytes | memoryview, max_pixels: int = MAX_PIXELS, *, fast_chroma: bool = False) -> Decoded:
    """Decode one image.

    `fast_chroma` repeats a JPEG's coarser chroma where it would be interpolated. Raises ImageError with the reason when
    the image is empty, damaged, too large or of no known kind.
    """
    if not len(data):
        raise ImageError("the file has zero bytes")
    if bytes(data[:2]) == b"\xff\xd8":
        return Decoded(*_decode_jpeg(data, max_pixels, fast_chroma))
    pixels, losses = _decode_with_pillow(data, max_pixels)
    return Decoded(pixels, True, losses)


def _decode_jpeg(data: bytes | memoryview, max_pixels: int, fast_chroma: bool) -> tuple[NDArray[np.uint8], bool]:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # no header, or a chroma layout that simplejpeg does not know and Pillow may
        return _decode_with_pillow(data, max_pixels)[0], True
    _check_size(height, width, max_pixels)
    if colours in ("CMYK", "YCCK"):
        cmyk = 255 - _decode_strictly(data, "CMYK")  # stored inverted, by Adobe's custom and Pillow's reading
        return np.array(Image.fromarray(cmyk, "CMYK").convert("RGB")), True
    return _decode_strictly(data, "RGB", fast_chroma), colours == "Gray"


def _decode_strictly(data: bytes | memoryview, colours: str, fast_chroma: bool = False) -> NDArray[np.uint8]:
    try:
        return simplejpeg.decode_jpeg(data, colours, fastupsample=fast_chroma)
    except ValueError as error:
        if not _HARMLESS.search(str(error)):
            raise ImageError(f"damaged JPEG: {error}") from error
    return simplejpeg.decode_jpeg(data, colours, fastupsample=fast_chroma, strict=False)


def _decode_with_pillow(data: bytes | memoryview, max_pixels: int) -> tuple[NDArray[np.uint8], tuple[Loss, ...]]:
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own limit; from there on it warns, from twice that it refuses
    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            _check_size(image.height, image.width, max_pixels)
            return to_rgb(image)
    except ImageError:
        raise
    except Exception as error:  # on hostile bytes Pillow's plug-ins raise nearly anything
        reason = _ADDRESS.sub("", str(error))
        if (isinstance(error, UnidentifiedImageError) or reason in UNKNOWN_PIXELS) and (kind := other_kind(data)):
            raise ImageError(not_read(kind)) from error
        start = bytes(data[:12])
        raise ImageError(f"not a readable image ({reason}); it starts with {start!r}") from error


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise ImageError(
            f"{width} x {height} pixels exceed the limit of {max_pixels / 1e6:.0f} million:"
            f" --max_pixels {math.ceil(height * width / 1e6)} (train, eval, convert) reads it, see {PAGE}"
        )
