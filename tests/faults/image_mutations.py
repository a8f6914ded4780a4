"""Seeded damage to image files of every kind, as transfers, editors and dying disks do it."""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.pipelines.layouts import KNOWN, UNKNOWN, layout_jpeg
from tests.pipelines.pictures import encoded, jpeg, picture
from tests.pipelines.transforms.test_decode import ODD

_RGB = Image.fromarray(picture(3, 40, 52))


def _thumbnail() -> bytes:
    exif = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0" + encoded(_RGB.resize((20, 16)), "JPEG")
    return encoded(_RGB, "JPEG", exif=exif)


def _ycck() -> bytes:
    data = bytearray(ODD["cmyk"])
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


JPEGS: dict[str, bytes] = {
    **{
        f"{layout} {kind}": layout_jpeg(layout, **settings)
        for layout in KNOWN + UNKNOWN
        for kind, settings in {
            "": {},
            "progressive": {"progressive": True},
            "restarts": {"restarts": 2},
            "progressive restarts": {"progressive": True, "restarts": 2},
        }.items()
    },
    **{kind: ODD[kind] for kind in ("grey", "cmyk")},
    "ycck": _ycck(),
    "thumbnail": _thumbnail(),
    "profile": encoded(_RGB, "JPEG", icc_profile=bytes(600)),
    "large": encoded(Image.fromarray(np.random.default_rng(1).integers(0, 256, (120, 150, 3), np.uint8)), "JPEG"),
    "smooth": jpeg(1, 200, 300),
}
OTHERS: dict[str, bytes] = {
    **{kind: data for kind, data in ODD.items() if kind not in ("grey", "cmyk")},
    **{
        f"tiff {how}": encoded(_RGB, "TIFF", compression=how)
        for how in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")
    },
    "animated gif": encoded(_RGB, "GIF", save_all=True, append_images=[_RGB.rotate(9)]),
    "animated png": encoded(_RGB, "PNG", save_all=True, append_images=[_RGB.rotate(9)]),
    "palette bmp": encoded(_RGB.convert("P"), "BMP"),
    "lossless webp": encoded(_RGB, "WEBP", lossless=True),
    "ppm": encoded(_RGB, "PPM"),
}


def _bytes_changed(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 12))):
        data[rng.randrange(2, len(data))] = rng.randrange(256)


def _header_changed(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(2, min(len(data), 700))] = rng.choice((0, 255, rng.randrange(256)))


def _bit_flipped(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(2, len(data))] ^= 1 << rng.randrange(8)


def _inserted(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(2, len(data))
    data[at:at] = rng.randbytes(rng.randrange(1, 8))


def _removed(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(2, len(data))
    del data[at : at + rng.randrange(1, 8)]


def _repeated(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(2, len(data))
    data[at:at] = data[at : at + rng.randrange(200)]


def _zeroed(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(2, len(data))
    end = min(at + rng.randrange(1, 60), len(data))
    data[at:end] = bytes(end - at)


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(2, len(data)) :]


_HOW: list[Callable[[bytearray, random.Random], None]] = [
    *(_bytes_changed, _bytes_changed, _header_changed, _bit_flipped, _inserted, _removed, _repeated, _zeroed, _cut)
]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """With one damage, of a kind and at a place that `rng` draws; the first two bytes stay."""
    changed = bytearray(data)
    rng.choice(_HOW)(changed, rng)
    return bytes(changed)


def as_pillow(data: bytes) -> np.ndarray | None:
    """(H, W, 3) uint8; None where Pillow refuses."""
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except Exception:
        return None
