"""Large images of which windows are read: .npy, and TIFF in tiles, in strips, or not compressed.

Files are read by position, not mapped: a file that is cut short, or a disk that fails, gives an error and no SIGBUS.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import ImageError, SettingsError
from spark_fast.pipelines.transforms.bands.arrays import NPY, checked_header, image_shape
from spark_fast.pipelines.transforms.bands.expected import Expected
from spark_fast.pipelines.transforms.bands.tiff_pages import open_tiff, page_a_channel, planes_apart
from spark_fast.pipelines.transforms.bands.tiff_segments import Segments
from spark_fast.pipelines.transforms.file_kinds import TIFF, reason_of

_ANY_SIZE = 2**62  # pixels of a scene; its windows are limited


class Window(NamedTuple):
    """A part of a scene, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Scene(Protocol):
    """A large image that is open."""

    height: int
    width: int

    def read(self, window: Window) -> NDArray:
        """The pixels of a window, (height, width, channels), as stored. Raises ImageError or OSError."""
        ...


@contextmanager
def open_scene(path: Path, expected: Expected) -> Iterator[Scene]:
    """A scene of these channels, whatever its size; its strips or tiles have at most `max_pixels`.

    Raises ImageError where it is damaged, of other channels, or of a kind of which no window can be read; OSError;
    SettingsError where the library that reads it is not installed.
    """
    with open(path, "rb", opener=_at_once) as opened:  # pathlib's takes no opener
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise ImageError("it is a pipe or device, not a regular file")
        try:
            yield _scene(opened, expected)
        except (ImageError, OSError, SettingsError):
            raise
        except Exception as error:  # on hostile bytes a decoder raises nearly anything
            raise ImageError(f"damaged, or not read ({reason_of(error)})") from error


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for ever


def _scene(file: BinaryIO, expected: Expected) -> Scene:
    start = file.read(8)
    file.seek(0)
    if start[:4] in TIFF:
        return _tiff(file, expected)
    if start[:6] == NPY:
        return _npy(file, expected)
    raise ImageError(f"windows can be read only from TIFF and .npy; it starts with {start!r}")


def _npy(file: BinaryIO, expected: Expected) -> Scene:
    header = checked_header(file, replace(expected, max_pixels=_ANY_SIZE))
    if header.by_columns and min(header.shape) > 1:
        raise ImageError("an array in Fortran order, of which no rows are read: save numpy.ascontiguousarray of it")
    height, width, channels = image_shape(header.shape, expected)
    apart = expected.channels_first and len(header.shape) == 3
    return Numbers(file, file.tell(), header.dtype, height, width, channels, apart)


def _tiff(file: BinaryIO, expected: Expected) -> Scene:
    anything = replace(expected, max_pixels=_ANY_SIZE)
    pages = page_a_channel(opened := open_tiff(file), anything)
    parts: list[Scene] = []
    for page in pages:
        if page.is_contiguous and page.is_final:  # the numbers as they are, one after another
            dtype = np.dtype(page.dtype).newbyteorder(opened.byteorder)
            size = page.imagelength, page.imagewidth, page.samplesperpixel
            parts.append(Numbers(file, page.dataoffsets[0], dtype, *size, planes_apart(page)))
        else:
            parts.append(Segments(file, page, expected.max_pixels))
    return parts[0] if len(parts) == 1 else Stacked(parts)


@dataclass
class Stacked:
    """A part for each channel."""

    parts: list[Scene]

    def __post_init__(self) -> None:
        self.height, self.width = self.parts[0].height, self.parts[0].width

    def read(self, window: Window) -> NDArray:
        """(height, width, channels)."""
        return np.concatenate([part.read(window) for part in self.parts], axis=2)


@dataclass
class Numbers:
    """The numbers of a scene as they lie in a file from `offset` on: (H, W, C), or with `apart` (C, H, W)."""

    file: BinaryIO
    offset: int
    dtype: np.dtype
    height: int
    width: int
    channels: int
    apart: bool = False

    def read(self, window: Window) -> NDArray:
        """(height, width, channels), a read a row."""
        planes, beside = (self.channels, 1) if self.apart else (1, self.channels)
        size = window.width * beside * self.dtype.itemsize
        out = np.empty((planes, window.height, size), np.uint8)
        for plane in range(planes):
            for row in range(window.height):
                before = ((plane * self.height + window.top + row) * self.width + window.left) * beside
                at = self.offset + before * self.dtype.itemsize
                data = os.pread(self.file.fileno(), size, at)
                if len(data) < size:
                    raise ImageError(f"the file is cut short: {len(data)} bytes at {at} where {size} were written")
                out[plane, row] = np.frombuffer(data, np.uint8)
        numbers = out.view(self.dtype).reshape(planes, window.height, window.width, beside)
        return numbers[:, :, :, 0].transpose(1, 2, 0) if self.apart else numbers[0]  # (C, h, w, 1) -> (h, w, C)
