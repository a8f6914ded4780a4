"""DICOM, single frames: float32, the stored number times the file's rescale slope plus its intercept, by pydicom."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.bands.expected import Expected, Stored
from spark_fast.pipelines.transforms.bands.scientific import scientific

_DEFLATED = b"1.2.840.10008.1.2.1.99"  # a whole file packed: it may unpack to any size


def is_dicom(data: bytes | memoryview) -> bool:
    """Whether a file begins as DICOM does."""
    return bytes(data[128:132]) == b"DICM"


def read_dicom(data: bytes | memoryview, expected: Expected) -> Stored:
    """One frame, rescaled. Where the least number is white (MONOCHROME1), the stored numbers are inverted first.

    Raises ImageError for several frames, and for a compression that pydicom cannot undo here, with its name.
    """
    pydicom = scientific("pydicom", "DICOM files")
    if _DEFLATED in bytes(data[:4096]):
        raise ImageError("a DICOM file that is deflated as a whole, which is not supported")
    file = pydicom.dcmread(io.BytesIO(data))
    if "PixelData" not in file and "FloatPixelData" not in file and "DoubleFloatPixelData" not in file:
        raise ImageError("a DICOM file without pixels")
    if (frames := int(file.get("NumberOfFrames") or 1)) != 1:
        raise ImageError(f"a DICOM file of {frames} frames; only single frames are supported")
    height, width, channels = int(file.Rows), int(file.Columns), int(file.get("SamplesPerPixel", 1))
    expected.check(height, width, channels, "float32")
    try:
        pixels = file.pixel_array.reshape(height, width, channels)
    except (RuntimeError, NotImplementedError) as error:
        syntax = file.file_meta.TransferSyntaxUID.name
        raise ImageError(f"a DICOM file whose pixels pydicom cannot read ({syntax}): {error}") from error
    if file.get("PhotometricInterpretation") == "MONOCHROME1":
        pixels = _inverted(pixels, int(file.BitsStored), signed=bool(file.PixelRepresentation))
    slope, intercept = float(file.get("RescaleSlope", 1)), float(file.get("RescaleIntercept", 0))
    return Stored((pixels * np.float64(slope) + intercept).astype(np.float32))


def _inverted(pixels: NDArray, bits: int, *, signed: bool) -> NDArray[np.int64]:
    """The least number that so many bits hold becomes the largest, and so on: the same for every image of a scanner."""
    return (-1 if signed else 2**bits - 1) - pixels.astype(np.int64)
