"""Every kind of file gives the numbers that were written into it, or a reason; no header is simply believed."""

from __future__ import annotations

import io
import struct
import sys
import tracemalloc
import zipfile
import zlib
from contextlib import suppress

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from spark_fast.errors import ImageError, SettingsError
from spark_fast.pipelines.transforms.bands import arrays
from spark_fast.pipelines.transforms.bands.decode_bands import decode_bands
from spark_fast.pipelines.transforms.bands.expected import Expected
from spark_fast.pipelines.transforms.pillow_pixels import Loss
from tests.pipelines.bands import bands, dicom_of, npy_of, npz_of, png_of, tiff_of
from tests.pipelines.pictures import encoded, jpeg, picture

EVERY = [(1, "uint16"), (4, "uint8"), (12, "uint16"), (5, "float32"), (2, "int16"), (3, "float16"), (7, "int32")]


def decoded(data: bytes, in_chans: int, **expected: object) -> np.ndarray:
    found = decode_bands(data, Expected(in_chans, **expected))  # type: ignore[arg-type]
    assert found.losses == ()
    return found.pixels


def same(found: np.ndarray, written: np.ndarray) -> bool:
    return found.dtype == written.dtype and found.dtype.isnative and np.array_equal(found, written)


@pytest.mark.parametrize(("channels", "dtype"), EVERY)
def test_arrays_are_read_as_they_were_written(channels, dtype):
    pixels = bands(1, 20, 30, channels, dtype)
    assert same(decoded(npy_of(pixels), channels), pixels)
    assert same(decoded(npy_of(np.asfortranarray(pixels)), channels), pixels)
    assert same(decoded(npy_of(pixels.astype(pixels.dtype.newbyteorder(">"))), channels), pixels)
    first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    assert same(decoded(npy_of(first), channels, channels_first=True), pixels)
    assert same(decoded(npz_of(image=pixels), channels), pixels)
    assert same(decoded(npz_of(a=pixels, b=first), channels, npz_key="a"), pixels)


def test_one_thread_at_a_time_parses_an_arrays_header(monkeypatch):
    """Else a sound file is now and then refused (CPython 3.11): "AST constructor recursion depth mismatch"."""
    held, parse = [], arrays.npy.read_array_header_1_0

    def watched(file):
        held.append(arrays._PARSING.locked())
        return parse(file)

    monkeypatch.setattr(arrays.npy, "read_array_header_1_0", watched)
    decoded(npy_of(bands(1)), 5)
    decoded(npz_of(a=bands(1)), 5)
    assert held == [True, True]


def test_an_array_of_two_axes_is_one_channel():
    pixels = bands(1, 20, 30, 1)
    assert same(decoded(npy_of(pixels[:, :, 0]), 1), pixels)
    assert same(decoded(npy_of(pixels[:, :, 0]), 1, channels_first=True), pixels)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"planarconfig": "separate"},
        {"tile": (16, 16)},
        {"tile": (16, 16), "planarconfig": "separate", "compression": "zlib", "predictor": True},
        {"compression": "zstd"},
        {"compression": "lzw", "rowsperstrip": 7},
        {"byteorder": ">"},
        {"bigtiff": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint16"), (12, "uint16"), (5, "float32"), (4, "uint8")])
def test_tiffs_of_every_layout_are_read_as_they_were_written(channels, dtype, options):
    pixels = bands(1, 40, 50, channels, dtype)
    written = np.ascontiguousarray(pixels.transpose(2, 0, 1)) if "planarconfig" in options else pixels
    if channels == 1:
        written, options = pixels[:, :, 0], {k: v for k, v in options.items() if k != "planarconfig"}
    elif "planarconfig" not in options:
        options = {**options, "planarconfig": "contig"}
    assert same(decoded(tiff_of(written, **options), channels), pixels)


def test_a_page_a_channel_is_one_image_and_one_channel_is_the_first_page():
    pixels = bands(1, 20, 30, 5)
    data = tiff_of(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    assert same(decoded(data, 5), pixels)
    assert same(decoded(data, 1), pixels[:, :, :1])
    with pytest.raises(ImageError, match="it has 1 channels where --in_chans is 4"):
        decoded(data, 4)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pngs_of_both_depths_are_read_as_they_were_written(channels, dtype):
    pixels = bands(1, 20, 30, channels, dtype)
    assert same(decoded(png_of(pixels), channels), pixels)


def test_a_grey_jpeg_is_one_channel_and_a_coloured_one_three():
    grey = np.ascontiguousarray(picture(1)[:, :, :1])
    pixels = decoded(simplejpeg.encode_jpeg(grey, 95, "GRAY"), 1)
    assert pixels.shape == grey.shape
    assert np.abs(pixels.astype(int) - grey).mean() < 2
    assert same(decoded(jpeg(1), 3), simplejpeg.decode_jpeg(jpeg(1)))
    with pytest.raises(ImageError, match="it has 1 channels where --in_chans is 3"):
        decoded(simplejpeg.encode_jpeg(grey, 95, "GRAY"), 3)


@pytest.mark.parametrize("kind", ["BMP", "PPM", "WEBP"])
def test_other_pictures_are_what_pillow_shows(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert same(decoded(encoded(Image.fromarray(picture(1)), kind, **options), 3), picture(1))


def test_a_palette_is_its_colours_and_a_bilevel_image_black_and_white():
    image = Image.fromarray(picture(1)).quantize(16)
    assert same(decoded(encoded(image, "PNG"), 3), np.asarray(image.convert("RGB")))
    assert same(decoded(encoded(image, "GIF"), 3), np.asarray(image.convert("RGB")))
    bilevel = picture(1)[:, :, 0] > 128
    assert same(decoded(encoded(Image.fromarray(bilevel), "PNG"), 1), 255 * bilevel[:, :, None].astype(np.uint8))


def test_a_portable_map_of_16_bits_keeps_them():
    pixels = bands(1, 20, 30, 3)
    for channels, kind in ((1, 5), (3, 6)):
        stored = np.ascontiguousarray(pixels[:, :, :channels])
        data = b"P%d\n# made by a test\n30 20\n4095\n" % kind + stored.astype(">u2").tobytes()
        assert same(decoded(data, channels), stored)
        with pytest.raises(ImageError, match="the file is cut short"):
            decoded(data[:-1], channels)


@pytest.mark.parametrize("dtype", ["uint16", "int16"])
def test_a_dicom_frame_is_rescaled(dtype):
    pixels = bands(1, 20, 30, 1, dtype)[:, :, 0] // 16 - (1000 if dtype == "int16" else 0)
    stored = decoded(dicom_of(pixels), 1)
    assert same(stored, pixels[:, :, None].astype(np.float32))
    found = decoded(dicom_of(pixels, RescaleSlope="2.5", RescaleIntercept="-1024"), 1)
    assert same(found, (2.5 * pixels.astype(np.float64) - 1024).astype(np.float32)[:, :, None])


@pytest.mark.parametrize(("dtype", "least", "most"), [("uint16", 0, 4095), ("int16", -2048, 2047)])
def test_a_dicom_frame_whose_least_number_is_white_is_inverted_before_it_is_rescaled(dtype, least, most):
    stored = np.array([[least, least + 1], [1000, most]], dtype)
    tags = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    shown = np.array([[most, most - 1], [least + most - 1000, least]], np.float32)[:, :, None]
    assert same(decoded(dicom_of(stored, **tags), 1), shown)
    assert same(decoded(dicom_of(stored, **tags, RescaleSlope="2.5", RescaleIntercept="-10"), 1), 2.5 * shown - 10)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"NumberOfFrames": 2}, "a DICOM file of 2 frames; only single frames are supported"),
        ({"SamplesPerPixel": 3}, "it has 3 channels where --in_chans is 1"),
        ({"Rows": 60000, "Columns": 60000}, "exceed the limit of 67 million"),
        ({"Rows": 21}, "damaged, or not read: a DICOM file"),
    ],
)
def test_dicom_files_of_other_kinds_are_named(tags, message):
    with pytest.raises(ImageError, match=message):
        decoded(dicom_of(bands(1, 20, 30, 1)[:, :, 0], **tags), 1)


def test_a_dicom_compression_that_cannot_be_undone_is_named():
    data = dicom_of(bands(1, 20, 30, 1)[:, :, 0])
    other = data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0")  # RLE, which these bytes are not
    with pytest.raises(ImageError, match="damaged, or not read: a DICOM file"):
        decoded(other, 1)
    packed = dicom_of(bands(1, 20, 30, 1)[:, :, 0]).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    with pytest.raises(ImageError, match="deflated as a whole"):
        decoded(packed, 1)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparency_is_a_channel_where_it_is_counted_and_dropped_with_a_word_where_it_is_not(channels, dtype):
    pixels = bands(1, 20, 30, channels + 1, dtype)
    files = [
        png_of(pixels),
        tiff_of(pixels, extrasamples=["unassalpha"], planarconfig="contig", photometric="rgb" if channels == 3 else 1),
    ]
    opaque = pixels.copy()
    opaque[:, :, -1] = np.iinfo(dtype).max
    for data in files:
        assert same(decoded(data, channels + 1), pixels)
        found = decode_bands(data, Expected(channels))
        assert same(found.pixels, pixels[:, :, :-1])
        remedy = f"if it holds data, --in_chans {channels + 1} reads it as a channel"
        assert found.losses == (Loss(f"of {channels} channels and transparency", "it is dropped", remedy),)
    assert same(decoded(png_of(opaque), channels), opaque[:, :, :-1])  # which loses nothing


def test_a_fourth_band_that_is_not_transparency_is_not_dropped():
    data = tiff_of(bands(1, 20, 30, 4), planarconfig="contig", extrasamples=["unspecified"], photometric="rgb")
    assert decoded(data, 4).shape == (20, 30, 4)
    with pytest.raises(ImageError, match="it has 4 channels where --in_chans is 3"):
        decoded(data, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_numbers_that_are_not_finite_are_refused(dtype, value):
    pixels = bands(1, 20, 30, 5, dtype)
    pixels[3, 4, 2] = value
    for data in (npy_of(pixels), tiff_of(pixels, planarconfig="contig")):
        with pytest.raises(ImageError, match=r"^1 of its 3000 numbers are NaN or infinite$"):
            decoded(data, 5)


def zipped(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def png_header(width: int, height: int, depth: int, colours: int) -> bytes:
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + bytes(12)


def huge_npy() -> bytes:
    """The header of an array of 60000 x 60000 x 4, and nothing after it."""
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (60000, 60000, 4)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


BOMBS = {
    "npy": huge_npy(),
    "npz": zipped("a.npy", huge_npy() + bytes(10**6)),
    "png": png_header(60000, 60000, 16, 6),
    "pnm": b"P6 60000 60000 65535\n",
    "tiff": tiff_of(bands(1, 20, 30, 4), planarconfig="contig").replace(
        struct.pack("<HHII", 256, 4, 1, 30), struct.pack("<HHII", 256, 4, 1, 60000000)
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_header_of_too_many_pixels_is_refused_before_memory_is_allocated(kind):
    channels = 3 if kind == "pnm" else 4
    with pytest.raises(ImageError, match="exceed the limit of 67 million: --max_pixels"):
        decoded(BOMBS[kind], channels)


@pytest.mark.parametrize("compression", ["zlib", "lzw", "zstd"])
def test_a_strip_that_unpacks_to_more_than_its_image_fills_no_memory(compression):
    """16 MB under the header of an image of 1 KB."""
    zeros = np.zeros((2048, 2048, 4), np.uint8)
    large = tiff_of(zeros, compression=compression, planarconfig="contig", rowsperstrip=2048)
    small = large.replace(struct.pack("<HII", 4, 1, 2048), struct.pack("<HII", 4, 1, 16))  # width, height
    assert small != large
    tracemalloc.start()
    with suppress(ImageError):
        assert decoded(small, 4).shape == (16, 16, 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20


def test_a_tile_of_too_many_pixels_is_refused_before_memory_is_allocated():
    data = tiff_of(bands(1, 20, 30, 4), planarconfig="contig", tile=(16, 16), compression="zlib")
    for tag in (322, 323):  # its width and length
        data = data.replace(struct.pack("<HHII", tag, 4, 1, 16), struct.pack("<HHII", tag, 4, 1, 60000))
    with pytest.raises(ImageError, match="60000 x 60000 pixels exceed the limit"):
        decoded(data, 4)


PICKLED = npy_of(np.array([[{}]], dtype=object))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "zero bytes"),
        (npy_of(bands(1, 20, 30, 4)), "it has 4 channels where --in_chans is 5"),
        (npy_of(bands(1, 5, 20, 30)), "it has 30 channels where --in_chans is 5; for .C, H, W. give --channels_first"),
        (npy_of(bands(1, 20, 30, 5)[:10])[:-1], "the file is cut short: 2999 bytes of numbers where 3000 were written"),
        (npy_of(bands(1, 5, 20, 5).astype(np.complex64)), "its numbers have type complex64"),
        (npy_of(np.zeros((2, 3, 4, 5))), r"an array of shape \(2, 3, 4, 5\)"),
        (npy_of(np.zeros((0, 3, 5))), "3 x 0 pixels are no image"),
        (PICKLED, "pickled Python objects, which are never loaded"),
        (npz_of(a=bands(1), b=bands(2)), "an .npz with 2 arrays, and --npz_key names none; there are: a, b"),
        (tiff_of(bands(1), planarconfig="contig")[:-100], "the file is cut short"),
        (tiff_of(bands(1), planarconfig="contig", compression="zlib")[:3000], "the file is cut short|a TIFF"),
        (png_of(bands(1, channels=3))[:2000], "it has 3 channels where --in_chans is 5"),
        (b"hello, world", "not a readable image .* supported are JPEG, PNG, TIFF, .npy, .npz, DICOM"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), r"not read: an HDF5 file"),
    ],
)
def test_what_cannot_be_read_is_named(data, message):
    with pytest.raises(ImageError, match=message):
        decoded(data, 5)


def test_the_array_asked_for_must_be_there():
    with pytest.raises(ImageError, match=r"an .npz with no array 'c'; there are: a"):
        decoded(npz_of(a=bands(1)), 5, npz_key="c")


@pytest.mark.parametrize("cut", [40, 400, 2000])
def test_a_png_of_16_bits_and_several_channels_that_is_cut_short_is_refused(cut):
    with pytest.raises(ImageError, match="not a readable image"):
        decoded(png_of(bands(1, channels=3))[:cut], 3)


@pytest.mark.parametrize(
    ("library", "data", "what"),
    [
        ("tifffile", tiff_of(bands(1, channels=1)[:, :, 0]), "TIFF files"),
        ("imagecodecs", png_of(bands(1, channels=2)), "PNG files of 16 bits and several channels"),
        ("pydicom", dicom_of(bands(1, channels=1)[:, :, 0]), "DICOM files"),
    ],
)
def test_a_library_that_is_missing_is_named_with_the_command_that_installs_it(monkeypatch, library, data, what):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(SettingsError, match=rf"{what} need {library}: pip install 'spark-fast\[scientific\]'"):
        decoded(data, 2 if library == "imagecodecs" else 1)
