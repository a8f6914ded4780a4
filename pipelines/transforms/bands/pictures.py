"""PNG, JPEG, PGM and PPM, BMP, GIF and WebP as stored: one channel per band, all 16 bits kept."""

from __future__ import annotations

import io
import re
from contextlib import suppress
from functools import partial

import numpy as np
from PIL import Image

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.bands.expected import Expected, Stored
from spark_fast.pipelines.transforms.bands.scientific import scientific
from spark_fast.pipelines.transforms.decode import allow_pixels, check_size
from spark_fast.pipelines.transforms.jpeg import decode_jpeg
from spark_fast.pipelines.transforms.jpeg_markers import read_frame
from spark_fast.pipelines.transforms.png_chunks import without_text

_COLOUR_TYPES = {0: 1, 2: 3, 4: 2, 6: 4}  # of a PNG without a palette -> channels
_MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I;16": 1}  # of Pillow -> channels
_PNM = re.compile(rb"P([56])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d{1,9})" + rb"\s")  # the header: width, height, maximum
_OTHERS = ("PNG", "BMP", "GIF", "WEBP")


def read_jpeg(data: bytes | memoryview, expected: Expected, *, judged: bool = False) -> Stored:
    """(H, W, 1) for grey, (H, W, 3) RGB for all else; judged strictly, as every JPEG is."""
    frame = None
    with suppress(ImageError):  # what is wrong, `decode_jpeg` says
        frame = read_frame(data)
    channels = 1 if frame is not None and len(frame.components) == 1 else 3
    if frame is not None:
        expected.check(frame.height, frame.width, channels, "uint8")
    pixels, _ = decode_jpeg(data, partial(check_size, max_pixels=expected.max_pixels), judged=judged)
    height, width, _ = pixels.shape
    expected.check(height, width, channels, "uint8")
    return Stored(pixels[:, :, :channels])


def read_png(data: bytes | memoryview, expected: Expected) -> Stored:
    """As stored; a palette as its colours. What is deeper than Pillow reads is imagecodecs'."""
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    depth, colours = data[24], data[25]
    if depth != 16 or colours not in (2, 4, 6):
        return read_with_pillow(data, expected)
    channels = _COLOUR_TYPES[colours]
    alpha = colours in (4, 6)
    expected.check(height, width, channels, "uint16", alpha=alpha)
    pixels = scientific("imagecodecs", "PNG files of 16 bits and several channels").png_decode(without_text(data))
    return Stored(pixels[:, :, :channels], alpha)  # a transparent colour comes as one channel more


def read_pnm(data: bytes | memoryview, expected: Expected) -> Stored:
    """PGM and PPM in their binary form, 8 or 16 bits, as stored."""
    header = _PNM.match(bytes(data[:256]))
    if header is None:
        raise ImageError(f"no binary PGM or PPM; it starts with {bytes(data[:12])!r}")
    kind, width, height, maximum = map(int, header.groups())
    channels, dtype = (1 if kind == 5 else 3), np.dtype(np.uint8 if maximum < 256 else ">u2")
    expected.check(height, width, channels, dtype)
    size = height * width * channels * dtype.itemsize
    if header.end() + size > len(data):
        raise ImageError(
            f"the file is cut short: {len(data) - header.end()} bytes of pixels where {size} are announced"
        )
    pixels = np.frombuffer(data, dtype, height * width * channels, header.end())
    return Stored(pixels.reshape(height, width, channels))


def read_with_pillow(data: bytes | memoryview, expected: Expected) -> Stored:
    """What Pillow reads without loss. ImageError for modes that it does not."""
    allow_pixels(expected.max_pixels)
    with Image.open(io.BytesIO(without_text(data)), formats=_OTHERS) as image:
        mode = image.mode
        if mode == "P":
            mode = "RGBA" if "transparency" in image.info else "RGB"
        elif mode == "1":
            mode = "L"
        elif mode == "I" and image.format == "PNG":  # 16 bits, before Pillow 11
            mode = "I;16"
        if mode not in _MODES:
            raise ImageError(f"an image of Pillow's mode {mode}, which is not supported with --in_chans or --scale")
        dtype, alpha = ("uint16" if mode == "I;16" else "uint8"), mode.endswith("A")
        expected.check(image.height, image.width, _MODES[mode], dtype, alpha=alpha)
        pixels = np.asarray(image if mode in (image.mode, "I;16") else image.convert(mode)).astype(dtype, copy=False)
        return Stored(pixels.reshape(image.height, image.width, -1), alpha)
