"""Files of 12 channels of 16 bits that are damaged, odd but valid, or bombs; and folders and shards of them."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import tifffile
from numpy.lib import format as npy

from spark_fast.pipelines.convert.band_records import BandRecords
from spark_fast.pipelines.sources.shard_format import NPY
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from tests.faults import stored
from tests.pipelines.bands import bands, npy_of, npz_of, tiff_of

CHANNELS = 12
KNOWN = Statistics("dtype", "uint16", (0.5,) * 12, (0.2,) * 12, (0.0,) * 12, (65535.0,) * 12)  # of a run before
# what a pipeline is told; the drills of processes have a file of their own
READ_AS = {"in_chans": CHANNELS, "statistics": KNOWN, "worker_processes": 0}
RECORDS = partial(BandRecords, in_chans=CHANNELS)

packed = partial(tiff_of, planarconfig="contig", compression="zlib", predictor=True)
plain = partial(tiff_of, planarconfig="contig")
folder_of = partial(stored.folder_of, ending=".tif")
shards_of = partial(stored.shards_of, ending=".tif", record=NPY, made_from={"images": {"in_chans": CHANNELS}})


def image(seed: int, height: int = 40, width: int = 50) -> np.ndarray:
    return bands(seed, height, width, CHANNELS)


def _stream_flipped(pixels: np.ndarray) -> bytes:
    """Some bytes of the last strip's deflate stream with all bits turned."""
    data = packed(pixels)
    at = len(data) - 600
    return data[:at] + bytes(b ^ 0xFF for b in data[at : at + 50]) + data[at + 50 :]


def _of_objects(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.full(pixels.shape, "x", object), allow_pickle=True)
    return buffer.getvalue()


def _npz_flipped(pixels: np.ndarray) -> bytes:
    data = bytearray(npz_of(image=pixels))
    data[len(data) // 2] ^= 0x10
    return bytes(data)


def npy_header(*shape: int) -> bytes:
    """Of an array of 16 bits, without its numbers."""
    buffer = io.BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": "<u2", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


DAMAGED: dict[str, Callable[[np.ndarray], bytes]] = {
    "zero bytes": lambda pixels: b"",
    "truncated": lambda pixels: packed(pixels)[:-700],
    "truncated, not packed": lambda pixels: plain(pixels)[:-1],
    "cut in the header": lambda pixels: packed(pixels)[:80],
    "garbage": lambda pixels: np.random.default_rng(len(pixels)).bytes(5000),
    "html": lambda pixels: b"<!DOCTYPE html><title>404 Not Found</title>",
    "zeros": lambda pixels: bytes(5000),
    "stream flipped": _stream_flipped,
    "array cut": lambda pixels: npy_of(pixels)[:-1],
    "wrong size": lambda pixels: npy_header(400, 500, CHANNELS) + pixels.tobytes(),
    "archive flipped": _npz_flipped,
    "objects": _of_objects,
    "NaN": lambda pixels: npy_of(np.where(pixels == pixels.max(), np.nan, pixels).astype(np.float32)),
    "a channel less": lambda pixels: packed(pixels[:, :, 1:]),
}


def _in_planes(pixels: np.ndarray, **how: object) -> bytes:
    return tiff_of(np.ascontiguousarray(pixels.transpose(2, 0, 1)), **how)


VALID: dict[str, Callable[[np.ndarray], bytes]] = {
    "strips": plain,
    "strips, packed": packed,
    "tiles, lzw": lambda pixels: plain(pixels, tile=(16, 32), compression="lzw"),
    "tiles, zstd": lambda pixels: plain(pixels, tile=(16, 16), compression="zstd"),
    "planes, lzma": lambda pixels: _in_planes(pixels, planarconfig="separate", compression="lzma"),
    "a page a channel": lambda pixels: _in_planes(pixels, photometric="minisblack"),
    "big-endian": lambda pixels: plain(pixels, byteorder=">"),
    "BigTIFF": lambda pixels: plain(pixels, bigtiff=True),
    "array": npy_of,
    "array by columns": lambda pixels: npy_of(np.asfortranarray(pixels)),
    "array, big-endian": lambda pixels: npy_of(pixels.astype(">u2")),
    "archive": lambda pixels: npz_of(image=pixels),
}


def _announcing(pixels: np.ndarray, **tags: int) -> bytes:
    """A TIFF whose header is changed."""
    buffer = io.BytesIO(plain(pixels, tile=(16, 16)) if "TileWidth" in tags else plain(pixels))
    with tifffile.TiffFile(buffer, mode="r+") as file:
        for name, value in tags.items():
            file.pages[0].tags[name].overwrite(value)
        file.filehandle.seek(0)
        return file.filehandle.read()


def _swelling(pixels: np.ndarray, size: int) -> bytes:
    """A TIFF with one strip, which unpacks to `size` bytes."""
    stream = zlib.compressobj(1)
    packed_zeros = b"".join(stream.compress(bytes(2**20)) for _ in range(size >> 20)) + stream.flush()
    data = tiff_of(pixels, planarconfig="contig", compression="zlib", rowsperstrip=len(pixels))
    with tifffile.TiffFile(buffer := io.BytesIO(data + packed_zeros), mode="r+") as file:
        file.pages[0].tags["StripOffsets"].overwrite(len(data))
        file.pages[0].tags["StripByteCounts"].overwrite(len(packed_zeros))
    return buffer.getvalue()


def bombs(*, large: bool) -> dict[str, bytes]:
    """Files that would fill the memory, and "sound" ones; `large`: as large as they may be."""
    pixels = image(0)
    return {
        "bomb of an array": npy_header(65000, 65000, CHANNELS) + bytes(100),
        "bomb of an array in an archive": npz_of(image=np.zeros((9000, 9000, 1), np.uint16)),
        "bomb of a TIFF": _announcing(pixels, ImageWidth=65000, ImageLength=65000),
        "bomb of a tile": _announcing(pixels, TileWidth=65536, TileLength=65536),
        "bomb of a strip": _swelling(pixels, 2**32 - 2**21 if large else 2**28),
        "sound": packed(pixels),
    }
