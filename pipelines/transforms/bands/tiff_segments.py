"""A window of a compressed TIFF page: only the strips or tiles that it overlaps are unpacked, one by one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.bands.tiff_pages import planes_apart

if TYPE_CHECKING:  # it is optional
    from tifffile import TiffPage


class Segments:
    """A page that is open. tifffile calls its strips and tiles segments."""

    def __init__(self, file: BinaryIO, page: TiffPage, max_pixels: int) -> None:
        """Raises ImageError where a segment has more than `max_pixels`, or some are missing."""
        self._file, self._page = file, page
        self.height, self.width = int(page.imagelength), int(page.imagewidth)
        self._size = (
            (int(page.tilelength), int(page.tilewidth))
            if page.is_tiled
            else (min(int(page.rowsperstrip), self.height), self.width)
        )
        rows, columns = self._size
        if rows * columns > max_pixels:
            raise ImageError(
                f"a TIFF whose {'tiles' if page.is_tiled else 'strips'} of {columns} x {rows} pixels can only be"
                " unpacked whole: write it in tiles of 512, or without compression"
            )
        self._planes = int(page.samplesperpixel) if planes_apart(page) else 1
        self._down, self._across = -(-self.height // rows), -(-self.width // columns)
        if len(page.dataoffsets) < self._planes * self._down * self._across:
            raise ImageError(
                f"a TIFF with {len(page.dataoffsets)} of its {self._planes * self._down * self._across} parts"
            )

    def read(self, window: tuple[int, int, int, int]) -> NDArray:
        """The pixels of a window, (height, width, channels), given by its top, left, height and width."""
        top, left, height, width = window
        rows, columns = self._size
        out = np.empty((height, width, self._page.samplesperpixel), self._page.dtype)
        for plane in range(self._planes):
            there = out[:, :, plane : plane + 1] if self._planes > 1 else out
            for row in range(top // rows, -(-(top + height) // rows)):
                for column in range(left // columns, -(-(left + width) // columns)):
                    self._put(
                        there,
                        (plane * self._down + row) * self._across + column,
                        row * rows - top,
                        column * columns - left,
                    )
        return out

    def _put(self, out: NDArray, number: int, top: int, left: int) -> None:
        """What of a segment lies in the window; `top` and `left`: where it begins there."""
        segment = self._unpacked(number)
        bottom, right = (
            min(start + size, end) for start, size, end in zip((top, left), self._size, out.shape, strict=False)
        )
        inside = out[max(top, 0) : bottom, max(left, 0) : right]
        if segment is None:
            inside[:] = self._page.nodata
        else:
            inside[:] = segment[0, max(-top, 0) :, max(-left, 0) :][: inside.shape[0], : inside.shape[1]]

    def _unpacked(self, number: int) -> NDArray | None:
        """(depth 1, rows, columns, channels); None where the file left it out."""
        offset, count = self._page.dataoffsets[number], self._page.databytecounts[number]
        if not count:
            return None
        data = os.pread(self._file.fileno(), count, offset) if offset + count <= self._length() else b""
        if len(data) < count:
            raise ImageError(f"the file is cut short: its header places {count} bytes at {offset} of {self._length()}")
        segment, _, _ = self._page.decode(data, number, jpegtables=self._page.jpegtables)
        return segment

    def _length(self) -> int:
        return os.fstat(self._file.fileno()).st_size
