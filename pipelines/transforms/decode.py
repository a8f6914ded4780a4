"""Bytes to pixels: (H, W, 3) uint8 RGB, or a reason why not.

libjpeg-turbo (simplejpeg, which releases the GIL) decodes JPEGs, Pillow all the rest. JPEGs are judged strictly:
see `jpeg`. EXIF orientation is not applied and alpha is dropped, both as in the published code.
"""

from __future__ import annotations

import io
import re
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.jpeg import decode_jpeg
from spark_fast.pipelines.transforms.png_chunks import without_text

MAX_PIXELS = 64 * 2**20  # a decompression bomb is refused from its header; 64 Mpx is 192 MiB as RGB

# Formats that Pillow decodes itself; left to guess, it would also start Ghostscript for an EPS.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
# In Pillow's messages; a conversion lists reasons, and the same image must give the same.
_ADDRESS = re.compile(r" <_io.BytesIO object at 0x[0-9a-f]+>")


def decode(
    data: bytes | memoryview, max_pixels: int = MAX_PIXELS, *, fast_chroma: bool = False, judged: bool = False
) -> tuple[NDArray[np.uint8], bool]:
    """Decode one image.

    Returns the pixels, (H, W, 3) uint8 RGB, and whether they were *converted*, that is, whether the file
    is anything other than a plain colour JPEG. `fast_chroma` repeats a JPEG's coarser chroma where it would be
    interpolated; `judged` says that these bytes were decoded before. Raises ImageError with the reason when the image
    is empty, damaged, too large or of no known kind.
    """
    pixels, what = decode_and_tell(data, max_pixels, fast_chroma=fast_chroma, judged=judged)
    return pixels, what is not None


def decode_and_tell(
    data: bytes | memoryview, max_pixels: int = MAX_PIXELS, *, fast_chroma: bool = False, judged: bool = False
) -> tuple[NDArray[np.uint8], str | None]:
    """As `decode`, with what a converted file is, in words for the manifest of a conversion."""
    if not len(data):
        raise ImageError("the file has zero bytes")
    try:
        if bytes(data[:2]) == b"\xff\xd8":
            check_size = partial(_check_size, max_pixels=max_pixels)
            return decode_jpeg(data, check_size, fast_chroma=fast_chroma, judged=judged)
        return _decode_with_pillow(data, max_pixels), f"not a JPEG (it starts with {bytes(data[:8])!r}), stored as one"
    except ImageError:
        raise
    except Exception as error:  # on hostile bytes a decoder raises nearly anything
        start = bytes(data[:12])
        reason = _ADDRESS.sub("", str(error))
        raise ImageError(f"not a readable image ({reason}); it starts with {start!r}") from error


def _decode_with_pillow(data: bytes | memoryview, max_pixels: int) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(without_text(data)), formats=_PILLOW_FORMATS) as image:
        _check_size(image.height, image.width, max_pixels)
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels of a Pillow image of any mode, first frame, (H, W, 3) uint8."""
    if image.mode == "F":
        raise ImageError("pixels are floating point numbers of unknown range")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip at 255
        grey = (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)  # (H, W) -> (H, W, 3)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if not height * width:
        raise ImageError(f"{width} x {height} pixels are no image")
    if height * width > max_pixels:
        raise ImageError(f"{width} x {height} pixels exceed the limit of {max_pixels / 1e6:.0f} million")
