"""Images that the tests make for themselves."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image


def picture(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """Smooth colour blobs, (height, width, 3) uint8: JPEG changes them little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(seed: int, height: int = 60, width: int = 80) -> bytes:
    return simplejpeg.encode_jpeg(picture(seed, height, width), 95, "RGB", "420")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
