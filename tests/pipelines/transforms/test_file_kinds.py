"""Files that are no images of the kinds that are read are called what they are."""

from __future__ import annotations

import gzip
import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.decode import decode_image
from spark_fast.pipelines.transforms.file_kinds import other_kind
from tests.pipelines.pictures import encoded, picture
from tests.pipelines.tiffs import tiff


def saved(save: object, *arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arrays)  # type: ignore[operator]
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jpg", b"no image")
    return buffer.getvalue()


VALUES = np.arange(24.0).reshape(2, 3, 4)
NIFTI = (348).to_bytes(4, "little") + bytes(340) + b"n+1\0" + bytes(100)
KINDS = {
    "a NumPy array (.npy)": saved(np.save, VALUES),
    "a zip archive (.npz": saved(np.savez, VALUES),
    "a zip archive (": zipped(),
    "a DICOM file (.dcm)": bytes(128) + b"DICM" + bytes(200),
    "a NIfTI volume (.nii)": NIFTI,
    "a gzip file (.nii.gz": gzip.compress(NIFTI),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "a film (.mp4": b"\0\0\0\x20ftypisom" + bytes(100),
    "a film (.avi)": b"RIFF\0\0\0\0AVI LIST" + bytes(100),
    "a film (.mkv": b"\x1a\x45\xdf\xa3" + bytes(100),
    "an AVIF image (.avif)": encoded(Image.fromarray(picture(0)), "AVIF"),
    "an HEIF image (.heic)": b"\0\0\0\x18ftypheic" + bytes(100),
    "a JPEG 2000 image": encoded(Image.fromarray(picture(0)), "JPEG2000"),
    "a TGA image (.tga)": encoded(Image.fromarray(picture(0)), "TGA"),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "one of floating point numbers of unknown range (F)": tiff(VALUES[:, :, :1].astype(np.float32)),
    "a TIFF of 1 x 64 bits (floating point, photometric 1, compression 1)": tiff(VALUES[:, :, :1]),
    "a TIFF of 4 x 16 bits (photometric 1": tiff(VALUES.astype(np.uint16), extra=(0, 0, 0)),
    "a TIFF of 3 x 16 bits (signed, photometric 2": tiff(VALUES[:, :, :3].astype(np.int16), photometric=2),
    "a TIFF of 7 x 8 bits (": tiff(np.zeros((4, 4, 7), np.uint8), photometric=2, extra=(0, 0, 0, 0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_named_with_what_is_read_and_where_to_read_on(kind):
    with pytest.raises(ImageError) as refused:
        decode_image(KINDS[kind])
    said = str(refused.value)
    assert said.startswith(f"not a readable image but {kind}")
    assert said.endswith(
        ", a kind that is not supported; supported are JPEG, PNG, BMP, GIF, PGM, PPM, TIFF and WebP of 8 or 16 bits;"
        " with --in_chans or --scale arrays, DICOM and every TIFF are, too: see docs/how_to/your_own_data.md"
    )


@pytest.mark.parametrize("length", [1, 4, 8, 9, 20, 200])
def test_a_tiff_cut_in_its_header_is_of_no_known_kind(length):
    assert other_kind(tiff(VALUES)[:length]) is None
