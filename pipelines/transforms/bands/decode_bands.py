"""Bytes to pixels of any number of channels and any depth, as stored, or a reason why not.

The counterpart of `transforms.decode` for `--in_chans` other than 3 and for `--scale`. Each format's header is checked
before memory is allocated: number of channels, kind of numbers, pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import ImageError, SettingsError
from spark_fast.pipelines.transforms.bands.arrays import NPY, NPZ, read_npy, read_npz
from spark_fast.pipelines.transforms.bands.dicom import is_dicom, read_dicom
from spark_fast.pipelines.transforms.bands.expected import Expected, Stored
from spark_fast.pipelines.transforms.bands.pictures import read_jpeg, read_png, read_pnm, read_with_pillow
from spark_fast.pipelines.transforms.bands.tiff_pages import read_tiff
from spark_fast.pipelines.transforms.file_kinds import PAGE, TIFF, other_kind, reason_of
from spark_fast.pipelines.transforms.pillow_pixels import Loss
from spark_fast.pipelines.transforms.png_chunks import SIGNATURE as PNG

READ = "JPEG, PNG, TIFF, .npy, .npz, DICOM, PGM, PPM, BMP, GIF and WebP"  # the kinds that are read
BY_PYTHON = (".tif", ".tiff", ".dcm", ".dicom")  # endings of files whose readers hold Python's lock most of the time


class Bands(NamedTuple):
    """A decoded image."""

    pixels: NDArray  # (H, W, in_chans), of the file's numbers in native byte order
    losses: tuple[Loss, ...] = ()


def decode_bands(data: bytes | memoryview, expected: Expected, *, judged: bool = False) -> Bands:
    """Decode one image, (H, W, in_chans).

    Args:
        judged: these bytes were decoded before.

    Raises:
        ImageError: the image is empty, damaged, too large, of other channels or of no known kind, or holds numbers that
            are not finite; with the reason.
        SettingsError: the library that reads this kind is not installed.
    """
    if not len(data):
        raise ImageError("the file has zero bytes")
    try:
        pixels, alpha = _read(data, expected, judged)
    except (ImageError, SettingsError):
        raise
    except Exception as error:  # on hostile bytes a decoder raises nearly anything
        if kind := other_kind(data):
            raise ImageError(f"damaged, or not read: {kind} ({reason_of(error)})") from error
        start = bytes(data[:12])
        raise ImageError(
            f"not a readable image ({reason_of(error)}); it starts with {start!r}; supported are {READ}: see {PAGE}"
        ) from error
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    losses: tuple[Loss, ...] = ()
    if alpha and pixels.shape[2] > expected.in_chans:
        if not _opaque(pixels[:, :, -1]):
            losses = (_dropped(expected.in_chans),)
        pixels = pixels[:, :, :-1]
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        count = pixels.size - np.isfinite(pixels).sum()
        raise ImageError(f"{count} of its {pixels.size} numbers are NaN or infinite")
    return Bands(pixels, losses)


def _read(data: bytes | memoryview, expected: Expected, judged: bool) -> Stored:
    start = bytes(data[:8])
    if start[:2] == b"\xff\xd8":
        return read_jpeg(data, expected, judged=judged)
    if start == PNG:
        return read_png(data, expected)
    if start[:4] in TIFF:
        return read_tiff(data, expected)
    if start[:6] == NPY:
        return read_npy(data, expected)
    if start[:4] == NPZ:
        return read_npz(data, expected)
    if is_dicom(data):
        return read_dicom(data, expected)
    return (read_pnm if start[:2] in (b"P5", b"P6") else read_with_pillow)(data, expected)


def _opaque(alpha: NDArray) -> bool:
    return bool((alpha == (1 if alpha.dtype.kind == "f" else np.iinfo(alpha.dtype).max)).all())


def _dropped(in_chans: int) -> Loss:
    kind = f"of {in_chans} channels and transparency"
    return Loss(kind, "it is dropped", f"if it holds data, --in_chans {in_chans + 1} reads it as a channel")
