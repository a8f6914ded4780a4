"""Images in NumPy's .npy and .npz: the header is checked first, and pickled objects are never loaded."""

from __future__ import annotations

import io
import math
import threading
import zipfile
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.bands.expected import Expected, Stored

_PARSING = threading.Lock()  # NumPy parses a header by `ast`, whose recursion count is shared by threads

NPY, NPZ = npy.MAGIC_PREFIX, b"PK\x03\x04"  # how the files begin


class Header(NamedTuple):
    """Of a .npy file."""

    shape: tuple[int, ...]
    by_columns: bool  # Fortran order
    dtype: np.dtype


def read_npy(data: bytes | memoryview, expected: Expected) -> Stored:
    """The image of a .npy file, (H, W, C), as a view of its bytes: nothing is copied. Raises ImageError."""
    file = io.BytesIO(data)
    header = checked_header(file, expected)
    return _stored(np.frombuffer(data, np.uint8, offset=file.tell()), header, expected)


def read_npz(data: bytes | memoryview, expected: Expected) -> Stored:
    """The image (H, W, C) of the .npz key asked for, or its only array. Raises ImageError."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        key = expected.npz_key or (names[0] if len(names) == 1 else "")
        if key not in names:
            what = f"no array {key!r}" if key else f"{len(names)} arrays, and --npz_key names none"
            raise ImageError(f"an .npz with {what}; there are: {', '.join(sorted(names)[:8])}")
        with archive.open(archive.namelist()[names.index(key)]) as file:
            header = checked_header(file, expected)
            size = math.prod(header.shape) * header.dtype.itemsize
            return _stored(np.frombuffer(file.read(size), np.uint8), header, expected)


def npy_of(pixels: NDArray) -> bytes:
    """An image (H, W, C) as a .npy file: row by row, little-endian."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<")))
    return buffer.getvalue()


def checked_header(file: IO[bytes], expected: Expected) -> Header:
    """The header of an array; the file is left where the numbers begin. Raises ImageError if it is not as expected."""
    version = npy.read_magic(file)
    with _PARSING:
        header = Header(*(npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file))
    if header.dtype.hasobject:
        raise ImageError("an array of pickled Python objects, which are never loaded")
    if len(header.shape) not in (2, 3):
        raise ImageError(f"an array of shape {header.shape}; an image is (H, W), (H, W, C) or, asked for, (C, H, W)")
    height, width, channels = image_shape(header.shape, expected)
    turned = not expected.channels_first and len(header.shape) == 3 and height == expected.in_chans
    hint = "; for (C, H, W) give --channels_first" if turned else ""
    expected.check(height, width, channels, header.dtype, hint=hint)
    return header


def image_shape(shape: tuple[int, ...], expected: Expected) -> tuple[int, int, int]:
    """Height, width and channels of an array of two or three axes."""
    if len(shape) == 2:
        return (*shape, 1)
    return (shape[1], shape[2], shape[0]) if expected.channels_first else (shape[0], shape[1], shape[2])


def _stored(content: NDArray[np.uint8], header: Header, expected: Expected) -> Stored:
    size = math.prod(header.shape) * header.dtype.itemsize
    if len(content) < size:
        raise ImageError(f"the file is cut short: {len(content)} bytes of numbers where {size} were written")
    numbers = content[:size].view(header.dtype)
    pixels = numbers.reshape(header.shape, order="F" if header.by_columns else "C")
    if pixels.ndim == 2:
        return Stored(pixels[:, :, None])
    return Stored(pixels.transpose(1, 2, 0) if expected.channels_first else pixels)  # (C, H, W) -> (H, W, C)
