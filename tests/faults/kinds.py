"""Damaged images, odd but valid ones, and bombs."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.pipelines.layouts import layout_jpeg
from tests.pipelines.pictures import encoded, jpeg, picture
from tests.pipelines.transforms.test_decode import ODD, PLAIN, bad_huffman_code, with_size


def _scan_flipped(data: bytes) -> bytes:
    """The second half of the scan with all bits turned, but no new markers."""
    start, end = (data.index(b"\xff\xda") + len(data)) // 2, len(data) - 2
    return data[:start] + bytes((b ^ 0xFF) % 255 for b in data[start:end]) + data[end:]


def _bad_huffman_table(data: bytes) -> bytes:
    """A table whose 16 counts promise more codes than there are."""
    counts = data.index(b"\xff\xc4") + 5
    return data[:counts] + b"\xff" * 16 + data[counts + 16 :]


def _as(kind: str, mode: str) -> Callable[[bytes], bytes]:
    def cut(data: bytes) -> bytes:
        other = encoded(Image.open(io.BytesIO(data)).convert(mode), kind)
        return other[: len(other) // 2]

    return cut


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "zero bytes": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "cut in the header": lambda data: data[:80],
    "no end marker": lambda data: data[:-2],
    "garbage": lambda data: np.random.default_rng(len(data)).bytes(len(data)),
    "html": lambda data: b"<!DOCTYPE html><title>404 Not Found</title>",
    "zeros": lambda data: bytes(len(data)),
    "scan flipped": _scan_flipped,
    "bad huffman table": _bad_huffman_table,
    "bad huffman code": bad_huffman_code,
    "wrong size": lambda data: with_size(data, 2000, 1500),
    "png cut": _as("PNG", "RGB"),
}


def _ycck() -> bytes:
    """Pillow writes no YCCK: a CMYK file whose Adobe marker says so is one, of other colours."""
    data = bytearray(ODD["cmyk"])
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(picture(1)), "JPEG", exif=exif)


_GREY16 = Image.fromarray(np.linspace(0, 65535, 4800).astype(np.uint16).reshape(60, 80))
VALID: dict[str, bytes] = {
    **{kind: data for kind, data in ODD.items() if kind != "one bit"},  # dithered: what no JPEG keeps
    **PLAIN,
    **{f"exif {orientation}": _exif(orientation) for orientation in range(1, 9)},
    "ycck": _ycck(),
    "4:4:1": layout_jpeg("1x4,1x1,1x1"),
    "3x2 chroma": layout_jpeg("3x2,1x1,1x1"),
    "progressive 3x1 chroma": layout_jpeg("3x1,1x1,1x1", progressive=True),
    "spare bytes": jpeg(5)[:-2] + bytes(214) + jpeg(5)[-2:],
    "16 bits": encoded(_GREY16, "PNG"),
    "1x1": jpeg(3, 1, 1),
    "1x4000": jpeg(3, 1, 4000),
    "4000x1": jpeg(3, 4000, 1),
    "large": jpeg(3, 1200, 900),
    "ü #1 (2)\n" + "x" * 180: jpeg(4),
}


def _text_bomb() -> bytes:
    """A PNG whose comment is 1 GB when unpacked."""
    chunk = b"zTXtComment\0\0" + _deflated(2**30)
    png = encoded(Image.fromarray(picture(1)), "PNG")
    at = 33  # after the header
    size, checksum = (len(chunk) - 4).to_bytes(4, "big"), zlib.crc32(chunk).to_bytes(4, "big")
    return png[:at] + size + chunk + checksum + png[at:]


def _deflated(size: int) -> bytes:
    packer, block = zlib.compressobj(9), bytes(2**24)
    return b"".join(packer.compress(block) for _ in range(size // len(block))) + packer.flush()


def _large_exif() -> bytes:
    """50 MB of EXIF before a sound picture."""
    data = jpeg(5)
    segment = b"\xff\xe1" + (65535).to_bytes(2, "big") + b"Exif\0\0" + bytes(65527)
    return data[:2] + segment * 763 + data[2:]


def bombs(large: bool) -> dict[str, bytes]:
    """Files that would unpack to much; those named "sound" are to be read all the same, one as large as may be."""
    sound = {"sound 60 Mpx": jpeg(6, 7500, 8000)} if large else {}
    return sound | {
        "bomb 65000x65000": with_size(jpeg(1), 65000, 65000),
        "bomb 200 Mpx": with_size(jpeg(1), 10000, 20000),
        "bomb 200 Mpx png": encoded(Image.new("1", (20000, 10000)), "PNG"),
        "bomb 200 Mpx gif": encoded(Image.new("P", (16000, 12500)), "GIF"),
        "sound 1 GB text": _text_bomb(),
        "sound 50 MB exif": _large_exif(),
    }
