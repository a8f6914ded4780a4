"""Images of any channels and numbers that the tests make for themselves, and the files that hold them."""

from __future__ import annotations

import io

import imagecodecs
import numpy as np
import pydicom
import tifffile
from pydicom.dataset import FileDataset, FileMetaDataset

FLOATS = {"float16", "float32", "float64"}


def bands(seed: int, height: int = 60, width: int = 80, channels: int = 5, dtype: str = "uint16") -> np.ndarray:
    """Smooth waves of a known level and size in each channel, and noise: (height, width, channels)."""
    rng = np.random.default_rng(seed)
    y, x, c = np.ogrid[:height, :width, :channels]
    waves = np.sin(x / (5 + seed % 3) + c) * np.cos(y / (7 + c)) + rng.normal(0, 0.1, (height, width, channels))
    values = (c + 2) / (channels + 4) + waves / (2 * channels + 8)  # in [0, 1]
    if dtype in FLOATS:
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    return (values.clip(0, 1) * min(limits.max, 2**31 - 128)).astype(dtype)


def tiff_of(pixels: np.ndarray, **options: object) -> bytes:
    """(H, W, C), or with planarconfig="separate" (C, H, W)."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **{"photometric": "minisblack", "metadata": None, **options})
    return buffer.getvalue()


def png_of(pixels: np.ndarray) -> bytes:
    return imagecodecs.png_encode(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def npy_of(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz_of(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def dicom_of(pixels: np.ndarray, **tags: object) -> bytes:
    """(H, W) of uint16 or int16, uncompressed; `tags`: more of them, such as RescaleSlope."""
    file = FileDataset("", {}, preamble=bytes(128), file_meta=FileMetaDataset())
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    file.Rows, file.Columns = pixels.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated = file.BitsStored = 16
    file.HighBit, file.PixelRepresentation = 15, int(pixels.dtype.kind == "i")
    file.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(file, name, value)
    buffer = io.BytesIO()
    file.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


SETS = {  # channels, numbers, and the file that holds them
    "1 x 16 bit": (1, "uint16", ".png", png_of),
    "4 x 8 bit": (4, "uint8", ".png", png_of),
    "12 x 16 bit": (12, "uint16", ".tif", lambda pixels: tiff_of(pixels, planarconfig="contig", compression="zlib")),
    "5 x float32": (5, "float32", ".npy", npy_of),
}
