"""What the pipelines use of simplejpeg, by Pillow and torchvision: for a machine where nothing can be installed.

It lets device decoding be measured there. Figures of host decoding are then not those of the product.
"""

from __future__ import annotations

import io
import sys
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode
from torchvision.io import decode_jpeg as torchvision_decode


def put_in_place() -> None:
    """From now on `import simplejpeg` gets this."""
    module = ModuleType("simplejpeg")
    module.__dict__.update(
        decode_jpeg=decode_jpeg, decode_jpeg_header=decode_jpeg_header, encode_jpeg=encode_jpeg, __version__="none"
    )
    sys.modules["simplejpeg"] = module


def pytest_load_initial_conftests() -> None:
    """As a plugin of pytest: before any test is imported."""
    put_in_place()


def is_in_place() -> bool:
    """Whether `put_in_place` was called."""
    return getattr(sys.modules.get("simplejpeg"), "decode_jpeg", None) is decode_jpeg


def decode_jpeg_header(data: bytes, strict: bool = True) -> tuple[int, int, str, str]:
    """(height, width, colour space, subsampling)."""
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return image.height, image.width, "YCbCr" if image.mode == "RGB" else "Gray", "420"


def decode_jpeg(data: bytes, colorspace: str = "RGB", fastupsample: bool = False, strict: bool = True) -> np.ndarray:
    """(h, w, 3) uint8; `fastupsample` changes nothing."""
    pixels = torchvision_decode(torch.from_numpy(np.frombuffer(data, np.uint8).copy()), ImageReadMode.RGB)
    return pixels.permute(1, 2, 0).contiguous().numpy()


def encode_jpeg(image: np.ndarray, quality: int = 90, colorspace: str = "RGB", subsampling: str = "420") -> bytes:
    """Baseline JPEG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()
