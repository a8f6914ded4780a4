"""The kind of a file that cannot be read as an image, by its first bytes, and the message that names it.

Such files are arrays, medical volumes, films. The message names their kind, the kinds that are read, and the page that
tells more.
"""

from __future__ import annotations

import io
import re

from PIL import TiffImagePlugin

READ = "JPEG, PNG, BMP, GIF, PGM, PPM, TIFF and WebP"  # the kinds that are read
PAGE = "docs/how_to/your_own_data.md"
UNKNOWN_PIXELS = ("unknown raw mode for given image mode", "pixels that are read wrongly")  # the first is Pillow's
IS_NOT_SUPPORTED = "a kind that is not supported"
_ADDRESS = re.compile(r" <_io.BytesIO object at 0x[0-9a-f]+>|( object)? at 0x[0-9a-f]+")  # the first is in Pillow's

# offset and bytes -> what it is; the first that fits
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x93NUMPY", "a NumPy array (.npy)"),
    (0, b"PK\x03\x04", "a zip archive (.npz, .zip, .pt)"),
    (128, b"DICM", "a DICOM file (.dcm)"),
    (344, b"n+1\0", "a NIfTI volume (.nii)"),
    (344, b"ni1\0", "a NIfTI header (.hdr)"),
    (4, b"n+2\0", "a NIfTI volume (.nii)"),
    (0, b"\x1f\x8b", "a gzip file (.nii.gz, .gz)"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (.h5, .nc, .mat)"),
    (0, b"CDF", "a NetCDF file (.nc)"),
    (0, b"MATLAB", "a MATLAB file (.mat)"),
    (0, b"NRRD", "an NRRD volume (.nrrd)"),
    (0, b"ObjectType", "a MetaImage header (.mhd, .mha)"),
    (0, b"SIMPLE  =", "a FITS file (.fits)"),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR image (.exr)"),
    (0, b"#?RADIANCE", "a Radiance image (.hdr)"),
    (4, b"ftypavif", "an AVIF image (.avif)"),
    (4, b"ftypavis", "an AVIF image (.avif)"),
    (4, b"ftyphei", "an HEIF image (.heic)"),
    (4, b"ftypmif1", "an HEIF image (.heic)"),
    (4, b"ftyp", "a film (.mp4, .mov)"),
    (4, b"moov", "a film (.mov)"),
    (0, b"\x1a\x45\xdf\xa3", "a film (.mkv, .webm)"),
    (8, b"AVI ", "a film (.avi)"),
    (0, b"\0\0\x01\xba", "a film (.mpg)"),
    (0, b"\0\0\x01\xb3", "a film (.mpg)"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image (.jp2)"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image (.j2k)"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image (.jxl)"),
    (0, b"\xff\x0a", "a JPEG XL image (.jxl)"),
    (0, b"8BPS", "a Photoshop image (.psd)"),
    (0, b"qoif", "a QOI image (.qoi)"),
    (0, b"DDS ", "a DDS texture (.dds)"),
    (0, b"\0\0\x01\0", "an icon (.ico)"),
    (0, b"%PDF", "a PDF document (.pdf)"),
    (0, b"PAR1", "a Parquet table (.parquet)"),
    (257, b"ustar", "a tar (.tar)"),
    (0, b"version https://git-lfs", "a pointer of Git LFS: `git lfs pull` brings the file itself, which it says"),
)  # fmt: skip
_TGA_END = b"TRUEVISION-XFILE.\0"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how the files begin
_WIDTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR, _FORMAT = (
    256,
    258,
    259,
    262,
    277,
    284,
    339,
)  # tags of TIFF
_FORMATS = {2: "signed", 3: "floating point", 4: "of no format", 5: "complex", 6: "complex"}


def reason_of(error: Exception) -> str:
    """What a decoder says, without addresses in memory: a conversion lists reasons; the same image gives the same."""
    return _ADDRESS.sub("", str(error))


def not_read(what: str) -> str:
    """The words for a file of another kind."""
    more = "with --in_chans or --scale arrays, DICOM and every TIFF are, too"
    return (
        f"not a readable image but {what}, {IS_NOT_SUPPORTED}; supported are {READ} of 8 or 16 bits; {more}: see {PAGE}"
    )


def other_kind(data: bytes | memoryview) -> str | None:
    """What a file is that is no image of the kinds that are read, "a NumPy array (.npy)"; None: not known."""
    start = bytes(data[:512])
    for offset, signature, what in _SIGNATURES:
        if start[offset : offset + len(signature)] == signature:
            return what
    if start.startswith(TIFF):
        return _kind_of_tiff(bytes(data))
    return "a TGA image (.tga)" if bytes(data[-len(_TGA_END) :]) == _TGA_END else None


def _kind_of_tiff(data: bytes) -> str | None:
    """Bands, bits and format of a TIFF's first page; None when its header cannot be read."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2:4] in (b"+\0", b"\0+") else 8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        if _WIDTH not in tags:  # cut short
            return None
        bits, formats = (_tuple(tags.get(tag, 1)) for tag in (_BITS, _FORMAT))
        bands = int(tags.get(_SAMPLES, 1))
        depth = str(bits[0]) if len(set(bits)) == 1 else ", ".join(map(str, bits[:8]))
        details = [_FORMATS.get(formats[0], ""), "one band after the other" if tags.get(_PLANAR) == 2 else ""]
        details += [f"photometric {tags.get(_PHOTOMETRIC, 0)}", f"compression {tags.get(_COMPRESSION, 1)}"]
    except Exception:  # a header made by anyone
        return None
    return f"a TIFF of {bands} x {depth} bits ({', '.join(filter(None, details))})"


def _tuple(value: object) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)
