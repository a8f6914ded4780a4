"""TIFF of any bands, numbers, layout and compression, by tifffile and imagecodecs: the first page, as stored.

A file with a page for each channel, as microscopes write them, is one image. Neither orientation nor "white is zero"
is applied: the numbers are those of the file.
"""

from __future__ import annotations

import io
import logging
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.bands.expected import Expected, Stored
from spark_fast.pipelines.transforms.bands.scientific import scientific
from spark_fast.pipelines.transforms.decode import check_size

if TYPE_CHECKING:  # it is optional
    from tifffile import TiffFile, TiffPage

_PALETTE = 3  # a photometric interpretation
_ALPHA = (1, 2)  # kinds of extra samples
_PLANES = 2  # a planar configuration: one band after the other


def read_tiff(data: bytes | memoryview, expected: Expected) -> Stored:
    """The first page, or a page a channel. Raises ImageError for palettes and volumes, and where bytes are missing."""
    with open_tiff(io.BytesIO(data)) as file:
        pages = page_a_channel(file, expected)
        if len(pages) > 1:
            return Stored(np.concatenate([_pixels(page, len(data)) for page in pages], axis=2))
        return Stored(_pixels(pages[0], len(data)), _has_alpha(pages[0]))


def open_tiff(file: IO[bytes]) -> TiffFile:
    """A TiffFile. Raises SettingsError where tifffile or imagecodecs is not installed."""
    library = scientific("tifffile", "TIFF files")
    scientific("imagecodecs", "compressed TIFF files")
    if (said := logging.getLogger("tifffile")).level != logging.CRITICAL:  # setting it costs as much as a header
        said.setLevel(logging.CRITICAL)  # what it finds odd in a file that it reads
    return library.TiffFile(file, is_ome=False)  # an OME-TIFF may name other files


def page_a_channel(file: TiffFile, expected: Expected) -> list[TiffPage]:
    """The first page, or all where each holds one of the channels. Raises ImageError where they are not as expected."""
    first = file.pages.first
    if not (_channels(first) == 1 < expected.in_chans and len(file.pages) == expected.in_chans):
        _check(first, expected)
        return [first]
    if any(page.shape != first.shape or page.dtype != first.dtype for page in file.pages[1:]):
        raise ImageError(f"a TIFF of {expected.in_chans} pages that differ in size or numbers")
    _check(first, expected, pages=expected.in_chans)
    return [page.aspage() for page in file.pages]


def planes_apart(page: TiffPage) -> bool:
    """Whether a page's channels lie after each other, not beside each other."""
    return _channels(page) > 1 and int(page.planarconfig) == _PLANES


def _channels(page: TiffPage) -> int:
    return int(page.samplesperpixel)


def _has_alpha(page: TiffPage) -> bool:
    return bool(page.extrasamples) and int(page.extrasamples[-1]) in _ALPHA


def _check(page: TiffPage, expected: Expected, pages: int = 1) -> None:
    """Raise ImageError for what a page's header announces."""
    if int(page.photometric or 0) == _PALETTE:
        raise ImageError("a TIFF of palette colours: its numbers are places in a table, not measurements")
    if page.imagedepth != 1:
        raise ImageError(f"a TIFF volume of {page.imagedepth} slices")
    if page.dtype is None:
        raise ImageError(f"a TIFF of {page.bitspersample} bits of kind {page.sampleformat}, which is not supported")
    height, width = page.imagelength, page.imagewidth
    if page.is_tiled:  # a tile is unpacked whole
        check_size(page.tilelength, page.tilewidth, expected.max_pixels)
    expected.check(height, width, pages * _channels(page), page.dtype, alpha=pages == 1 and _has_alpha(page))


def _pixels(page: TiffPage, size: int) -> NDArray:
    """(H, W, channels); `size`: of the file, in bytes."""
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if offset + count > size:
            raise ImageError(f"the file is cut short: its header places {count} bytes at {offset} of {size}")
    pixels = page.asarray(maxworkers=1)  # the loader has its own threads
    if _channels(page) == 1:
        return pixels.reshape(page.imagelength, page.imagewidth, 1)
    return np.moveaxis(pixels, 0, -1) if planes_apart(page) else pixels  # (S, H, W) -> (H, W, S)
