"""The compiled part of the FFCV backend: records in, cropped, resized and flipped pixels out.

FFCV resizes with OpenCV's area filter; the published code uses Pillow's antialiased bicubic one, so that is
written out here (Pillow's src/libImaging/Resample.c): a separable filter whose support grows with the
reduction, its edge weights renormalised. Both are offered. FFCV also decodes a damaged JPEG to grey
silently; here each record's checksum is compared, and what the decoder reports is kept for each image.

To be imported only where FFCV is known to be installed.
"""

from __future__ import annotations

import ctypes
import ctypes.util

import numpy as np
from ffcv.libffcv import ctypes_imdecode, ctypes_resize
from numba import njit, prange
from numpy.typing import NDArray

# What is to become of one record; an array of these is the order in which FFCV traverses a file.
PLAN = np.dtype(
    [("sample", "<i4"), ("draw", "<i4"), ("crc", "<u4"), ("top", "<i4"), ("left", "<i4"), ("height", "<i4"),
     ("width", "<i4"), ("flip", "u1"), ("fault", "u1")]
)  # fmt: skip
OTHER_BYTES, UNDECODABLE = 1, 2  # faults

_LANES = 16  # rows resized together: float32 in one vector register
_JPEG = 0  # FFCV's number of the mode; raw is 1
_zlib = ctypes.CDLL(ctypes.util.find_library("z") or "libz.so.1")  # OpenCV needs it, too
_crc32 = _zlib.crc32
_crc32.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint32]
_crc32.restype = ctypes.c_uint64


@njit(nogil=True)
def _cubic(x: float) -> float:
    """Pillow's bicubic kernel, a = -0.5."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    if x < 2:
        return ((-0.5 * x + 2.5) * x - 4) * x + 2
    return 0.0


@njit(nogil=True)
def _weights(size: int, out_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """First cell, number of cells and their weights, (out_size,), (out_size,), (out_size, n), of each output."""
    scale = size / out_size
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    weights = np.zeros((out_size, int(np.ceil(support)) * 2 + 1), np.float32)
    first = np.empty(out_size, np.int64)
    count = np.empty(out_size, np.int64)
    for o in range(out_size):
        centre = (o + 0.5) * scale
        start = max(int(centre - support + 0.5), 0)
        stop = min(int(centre + support + 0.5), size)
        total = 0.0
        for k in range(stop - start):
            weight = _cubic((k + start - centre + 0.5) / stretch)
            weights[o, k] = weight
            total += weight
        for k in range(stop - start):
            weights[o, k] /= total
        first[o], count[o] = start, stop - start
    return first, count, weights


@njit(nogil=True, fastmath=True)
def resize_bicubic(image: NDArray[np.uint8], row: np.void, out: NDArray[np.uint8]) -> None:
    """Antialiased bicubic resize of the box of `image`, (h, w, 3), that `row` of a plan names, to `out` (H, W, 3).

    Columns first, then _LANES rows at once, turned on their side: both inner loops run along memory.
    """
    rows, columns = out.shape[0], out.shape[1]
    top, tall, down = _weights(row["height"], rows)
    left, wide, across = _weights(row["width"], columns)
    lines = image.reshape((image.shape[0], image.shape[1] * 3))
    start, stop = row["left"] * 3, (row["left"] + row["width"]) * 3
    line = np.empty(stop - start, np.float32)
    turned = np.zeros((stop - start, _LANES), np.float32)
    total = np.empty(_LANES, np.float32)
    for y in range(0, rows, _LANES):
        lanes = min(_LANES, rows - y)
        for lane in range(lanes):
            line[:] = 0.5  # rounds
            for k in range(tall[y + lane]):
                weight = down[y + lane, k]
                source = lines[row["top"] + top[y + lane] + k, start:stop]
                for i in range(len(line)):
                    line[i] += weight * np.float32(source[i])
            for i in range(len(line)):
                turned[i, lane] = line[i]
        for x in range(columns):
            to = columns - 1 - x if row["flip"] else x
            for channel in range(3):
                total[:] = 0
                for k in range(wide[x]):
                    weight, at = across[x, k], (left[x] + k) * 3 + channel
                    for lane in range(_LANES):
                        total[lane] += weight * turned[at, lane]
                for lane in range(lanes):
                    out[y + lane, to, channel] = min(max(total[lane], np.float32(0)), np.float32(255))


@njit(nogil=True)
def _resize_area(image: NDArray[np.uint8], row: np.void, out: NDArray[np.uint8]) -> None:
    """FFCV's own resize of a box of an image, (h, w, 3) -> `out` (H, W, 3)."""
    ctypes_resize(
        0, image.ctypes.data, image.shape[0], image.shape[1],
        row["top"], row["top"] + row["height"], row["left"], row["left"] + row["width"],
        out.ctypes.data, out.shape[0], out.shape[1],
    )  # fmt: skip
    if row["flip"]:
        for y in range(out.shape[0]):
            out[y] = out[y, ::-1].copy()


@njit(nogil=True, parallel=True)
def decode_planned(
    plan: NDArray[np.void],
    metadata: NDArray[np.void],
    file: NDArray[np.uint8],
    starts: NDArray[np.uint64],
    sizes: NDArray[np.uint64],
    out: NDArray[np.uint8],
    bicubic: bool,
) -> None:
    """Fill `out`, (n, H, W, 3), as `plan`, (n,) PLAN, says; a record that cannot be decoded gets its `fault`.

    `metadata` is FFCV's table of the image field; the record at the byte starts[i] of `file` has sizes[i] bytes.
    """
    for place in prange(len(plan)):
        row = plan[place]
        field = metadata[row["sample"]]
        start = field["data_ptr"]
        data = file[start : start + sizes[np.searchsorted(starts, start)]]
        height, width = np.int64(field["height"]), np.int64(field["width"])
        if _crc32(0, data.ctypes.data, data.size) != row["crc"]:
            row["fault"] = OTHER_BYTES
        elif field["mode"] == _JPEG:
            pixels = np.empty((height, width, 3), np.uint8)
            if ctypes_imdecode(
                data.ctypes.data, data.size, height, width, pixels.ctypes.data,
                height, width, 0, 0, 1, 1, False, False,
            ):  # fmt: skip
                row["fault"] = UNDECODABLE
            else:
                _show(pixels, row, out[place], bicubic)
        else:
            _show(data.reshape((height, width, 3)), row, out[place], bicubic)


@njit(nogil=True)
def _show(pixels: NDArray[np.uint8], row: np.void, out: NDArray[np.uint8], bicubic: bool) -> None:
    if bicubic:
        resize_bicubic(pixels, row, out)
    else:
        _resize_area(pixels, row, out)
