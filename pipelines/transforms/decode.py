"""Bytes to pixels: (H, W, 3) uint8 RGB, or a reason why not.

libjpeg-turbo (simplejpeg, which releases the GIL) decodes every JPEG, Pillow all the rest. JPEGs are
decoded *strictly*: where libjpeg would only warn and go on with grey blocks (file cut short, bad Huffman
code), the image is refused, because nobody would see the grey. EXIF orientation is not applied and alpha
is dropped, both as in the published code.
"""

from __future__ import annotations

import io
import re

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from spark_fast.errors import ImageError

MAX_PIXELS = 64 * 2**20  # a decompression bomb is refused from its header; 64 Mpx is 192 MiB as RGB

# Formats that Pillow decodes itself; left to guess, it would also start Ghostscript for an EPS.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
# libjpeg's warnings about headers alone; the pixels are whole.
_HARMLESS = re.compile(r"unknown JFIF revision|Unknown Adobe color transform|Invalid SOS parameters")

# In Pillow's messages; a conversion lists reasons, and the same image must give the same.
_ADDRESS = re.compile(r" <_io.BytesIO object at 0x[0-9a-f]+>")


def decode(
    data: bytes | memoryview, max_pixels: int = MAX_PIXELS, *, fast_chroma: bool = False
) -> tuple[NDArray[np.uint8], bool]:
    """Decode one image.

    Returns the pixels, (H, W, 3) uint8 RGB, and whether they were *converted*, that is, whether the file
    is anything other than a colour JPEG. `fast_chroma` repeats a JPEG's coarser chroma where it would be
    interpolated. Raises ImageError with the reason when the image is empty, damaged, too large or of no known kind.
    """
    if not len(data):
        raise ImageError("the file has zero bytes")
    if bytes(data[:2]) == b"\xff\xd8":
        return _decode_jpeg(data, max_pixels, fast_chroma)
    return _decode_with_pillow(data, max_pixels), True


def _decode_jpeg(data: bytes | memoryview, max_pixels: int, fast_chroma: bool) -> tuple[NDArray[np.uint8], bool]:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # no header, or a chroma layout that simplejpeg does not know and Pillow may
        return _decode_with_pillow(data, max_pixels), True
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


def _decode_with_pillow(data: bytes | memoryview, max_pixels: int) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            _check_size(image.height, image.width, max_pixels)
            return _to_rgb(image)
    except ImageError:
        raise
    except Exception as error:  # on hostile bytes Pillow's plug-ins raise nearly anything
        start = bytes(data[:12])
        reason = _ADDRESS.sub("", str(error))
        raise ImageError(f"not a readable image ({reason}); it starts with {start!r}") from error


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
    if height * width > max_pixels:
        raise ImageError(f"{width} x {height} pixels exceed the limit of {max_pixels / 1e6:.0f} million")
