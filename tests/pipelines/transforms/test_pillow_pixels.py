"""Images of every mode, depth and band become RGB of 8 bits, as stored, and say what they lose."""

from __future__ import annotations

import io
import itertools
import struct
import warnings
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.decode import decode_image
from spark_fast.pipelines.transforms.file_kinds import IS_NOT_SUPPORTED, PAGE
from spark_fast.pipelines.transforms.pillow_pixels import DARK, Loss
from tests.pipelines.pictures import encoded, picture
from tests.pipelines.tiffs import tiff

SIZE = (9, 12)
GREY16 = np.random.default_rng(0).integers(0, 2**16, SIZE).astype(np.uint16)
BANDS = np.random.default_rng(1).integers(0, 256, (*SIZE, 7)).astype(np.uint8)
BANDS16 = np.random.default_rng(2).integers(0, 2**16, (*SIZE, 7)).astype(np.uint16)
WHOLE = "rescale them first, or train with --in_chans 1, which reads them whole"
GREY = ("16-bit grey (I;16)", "only their upper 8 bits are read", WHOLE)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2)


def pgm16(values: np.ndarray) -> bytes:
    return b"P5\n%d %d\n65535\n" % values.shape[::-1] + values.astype(">u2").tobytes()


SIXTEEN = {
    "png": lambda values: encoded(Image.fromarray(values), "PNG"),
    "tiff": lambda values: encoded(Image.fromarray(values), "TIFF"),
    "tiff, deflated": lambda values: tiff(values[:, :, None], compression=8),
    "pgm": pgm16,
}


@pytest.mark.parametrize("kind", SIXTEEN)
def test_twelve_bits_in_sixteen_are_read_as_stored_and_called_dark(kind):
    for values, dark in ((GREY16, False), (GREY16 >> 4, True)):
        image = decode_image(SIXTEEN[kind](values))
        assert np.array_equal(image.pixels, grey(values >> 8))
        assert (image.pixels.max() < DARK) == dark
        assert image.losses == (Loss(*GREY, dark=dark),)
    bright = GREY16 >> 4
    bright[0, 0] = DARK << 8
    assert decode_image(SIXTEEN[kind](bright)).losses == (Loss(*GREY),)


def png_of(bands: np.ndarray, depth: int) -> bytes:
    """A PNG of 2 or 3 or 4 bands; Pillow writes no colours of 16 bits."""
    small = encoded(Image.fromarray(bands[:, :, :3].astype(np.uint8)), "PNG")
    height, width, count = bands.shape
    header = struct.pack(">IIBBBBB", width, height, depth, {2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    rows = bands.astype(">u2" if depth == 16 else "u1").reshape(height, -1)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return small[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def opaque(bands: np.ndarray) -> np.ndarray:
    bands = bands.copy()
    bands[:, :, -1] = np.iinfo(bands.dtype).max
    return bands


B8, B16 = BANDS, BANDS16
DEEP = {  # file, its pixels, the kinds of what it loses
    "png 3 x 16": (png_of(B16[:, :, :3], 16), B16[:, :, :3] >> 8, ["16-bit colour (RGB;16)"]),
    "png 4 x 16, opaque": (png_of(opaque(B16[:, :, :4]), 16), B16[:, :, :3] >> 8, ["16-bit colour (RGBA;16)"]),
    "png 2 x 16": (
        png_of(B16[:, :, :2], 16),
        grey(B16[:, :, 0] >> 8),
        ["16-bit colour (RGBA;16)", "RGB with a fourth band (RGBA)"],
    ),
    "ppm 3 x 16": (
        b"P6 12 9 65535\n" + B16[:, :, :3].astype(">u2").tobytes(),
        (B16[:, :, :3].astype(int) * 255 / 65535).round(),
        ["16-bit colour (RGB;16)"],
    ),
    "tiff 3 x 16": (tiff(B16[:, :, :3], photometric=2), B16[:, :, :3] >> 8, ["16-bit colour (RGB;16)"]),
    "tiff of 16 bits with a sign": (
        tiff(GREY16.view(np.int16)[:, :, None]),
        grey(GREY16.view(np.int16).clip(0) >> 8),
        ["signed 16-bit grey (I)"],
    ),
    "tiff of 32 bits": (
        tiff((GREY16.astype(np.uint32) * 2**15)[:, :, None]),
        grey((GREY16.astype(int) * 2**15).clip(0, 65535) >> 8),
        ["32-bit grey (I)"],
    ),
    "tiff of 8 bits with a sign": (tiff(B8.view(np.int8)[:, :, :1]), grey(B8[:, :, 0]), ["signed 8-bit grey (L)"]),
    "rgba png": (png_of(B8[:, :, :4], 8), B8[:, :, :3], ["RGB with a fourth band (RGBA)"]),
    "rgba png, opaque": (png_of(opaque(B8[:, :, :4]), 8), B8[:, :, :3], []),
    "grey png with alpha": (png_of(B8[:, :, :2], 8), grey(B8[:, :, 0]), ["grey with a second band (LA)"]),
    "grey png with alpha, opaque": (png_of(opaque(B8[:, :, :2]), 8), grey(B8[:, :, 0]), []),
    "tiff, alpha": (
        tiff(B8[:, :, :4], photometric=2, extra=(2,)), B8[:, :, :3], ["RGB with a fourth band (RGBA)"]
    ),
    "tiff, alpha, opaque": (tiff(opaque(B8[:, :, :4]), photometric=2, extra=(2,)), B8[:, :, :3], []),
    "tiff, a band of no meaning": (
        tiff(B8[:, :, :4], photometric=2, extra=(0,)), B8[:, :, :3], ["RGB with a fourth band (RGBX)"]
    ),
    "tiff, three more bands": (
        tiff(B8[:, :, :6], photometric=2, extra=(0, 0, 0)), B8[:, :, :3], ["RGB with 3 more bands"]
    ),
    "palette with one transparent colour": (
        encoded(Image.fromarray(B8[:, :, 0]).convert("P"), "PNG", transparency=3), grey(B8[:, :, 0]), []
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DEEP)
def test_what_is_deeper_or_has_more_bands_says_so_unless_nothing_is_lost(kind):
    data, pixels, kinds = DEEP[kind]
    image = decode_image(data)
    assert np.array_equal(image.pixels, pixels)
    assert [loss.kind for loss in image.losses] == kinds


def test_colours_divided_by_a_band_that_is_called_alpha_say_so():
    (loss,) = decode_image(tiff(B8[:, :, :4], photometric=2, extra=(1,))).losses
    assert loss.lost.startswith("the colours are divided by it")


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("bands", [B8[:, :, :4], B16[:, :, :3], B16[:, :, :4], GREY16[:, :, None]])
def test_bands_stored_one_after_the_other_are_read_right_or_refused(bands, compression):
    colours = bands.shape[2] > 1
    data = tiff(bands, photometric=1 + colours, planar=True, compression=compression)
    if (compression == 1 and bands.itemsize == 2) or (compression == 8 and bands.shape[2] == 4):
        with pytest.raises(ImageError, match=r"bits \(one band after the other, photometric .*, a kind that is not"):
            decode_image(data)
    else:
        pixels = bands[:, :, :3] if colours else grey(bands[:, :, 0])
        assert np.array_equal(decode_image(data).pixels, pixels >> 8 * (bands.itemsize - 1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF, deflated"])
def test_every_format_is_read_as_stored_whatever_its_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(picture(3, 20, 31))
    if kind.startswith("TIFF"):
        options = {"compression": "tiff_adobe_deflate"} if "," in kind else {}
        data = encoded(image, "TIFF", tiffinfo={0x0112: orientation}, **options)
    else:
        data = encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.getexif()[0x0112] == orientation
    pixels = decode_image(data).pixels
    assert pixels.shape == (20, 31, 3)
    if kind == "JPEG":
        pixels, image = np.round(pixels / 16), Image.open(io.BytesIO(encoded(image, "JPEG")))
        assert np.array_equal(pixels, np.round(np.asarray(image) / 16))
    else:
        assert np.array_equal(pixels, picture(3, 20, 31))


MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I F I;16 I;16B I;16L"
FORMATS = "PNG TIFF WEBP BMP GIF PPM JPEG TGA ICO JPEG2000 AVIF QOI SGI PCX DDS"
NOT_READ = {"TGA", "ICO", "JPEG2000", "AVIF", "QOI", "SGI", "PCX", "DDS"}
UNNAMED = {"SGI", "PCX"}  # whose first bytes are too few to be sure


def drawn(mode: str, seed: int) -> Image.Image:
    """An image of random pixels and size."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 40, 2).tolist()
    colours = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode.startswith("I;16"):
        values = rng.integers(0, 2 ** rng.integers(8, 17), (height, width))
        return Image.frombytes(mode, (width, height), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    if mode == "I":
        return Image.fromarray(rng.integers(-(2**16), 2**17, (height, width)).astype(np.int32))
    if mode == "F":
        return Image.fromarray(rng.standard_normal((height, width)).astype(np.float32))
    if mode in ("LAB", "RGBX"):
        return Image.frombytes(
            mode, (width, height), rng.bytes(height * width * len(Image.new(mode, (1, 1)).getbands()))
        )
    between = {"PA": "P", "La": "LA", "RGBa": "RGBA"}.get(mode, mode)
    image = colours.convert(between)
    if between in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
    return image.convert(mode)


def oracle(data: bytes) -> tuple[np.ndarray, bool]:
    """What Pillow shows of a file, by the table of docs/how_to/your_own_data.md; whether it has more bits or bands."""
    with Image.open(io.BytesIO(data)) as image:
        further = image.mode in ("LA", "La", "PA", "RGBA") and image.getchannel("A").getextrema() != (255, 255)
        further |= image.format == "TIFF" and image.mode == "RGB" and image.tag_v2[277] == 4
        if image.mode.startswith("I"):
            return grey((np.asarray(image).astype(np.int64).clip(0, 65535) // 256).astype(np.uint8)), True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray((image.convert("LA") if image.mode == "La" else image).convert("RGB")), further


def check_mode(mode: str, kind: str, seed: int) -> str:
    """One image of a mode in a format: what became of it."""
    try:
        data = encoded(drawn(mode, seed), kind)
    except (OSError, ValueError, KeyError, SystemError, TypeError):
        return "not written"
    try:
        found = decode_image(data)
    except ImageError as error:
        refusal = str(error)
    else:
        pixels, lossy = oracle(data)
        assert np.array_equal(found.pixels, pixels)
        assert bool(found.losses) == lossy
        return "read"
    assert kind in NOT_READ or mode == "F"
    assert kind in UNNAMED or (IS_NOT_SUPPORTED in refusal and PAGE in refusal)
    return "refused"


def test_every_mode_in_every_format_is_read_right_or_refused_by_name():
    found = {(m, f): check_mode(m, f, seed=7) for m, f in itertools.product(MODES.split(), FORMATS.split())}
    assert sum(result == "read" for result in found.values()) > 60
    assert sum(result == "refused" for result in found.values()) > 15
    assert {f for (_, f), result in found.items() if result == "read"} == {*FORMATS.split()} - NOT_READ


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES.split())
def test_many_images_of_every_mode_in_every_format(mode, times):
    for seed, kind in itertools.product(range(times(5, 200)), FORMATS.split()):
        check_mode(mode, kind, seed)


LAYOUTS = [  # bands, photometric interpretation, what the bands beyond the colours are
    (1, 1, ()), (1, 0, ()), (2, 1, (0,)), (2, 1, (2,)), (3, 2, ()), (4, 2, (0,)), (4, 2, ()), (4, 2, (2,)),
    (5, 2, (0, 0)), (5, 2, (2, 0)), (4, 1, (0, 0, 0)), (6, 2, (0, 0, 0)), (7, 2, (0, 0, 0, 0)),
]  # fmt: skip
TYPES = (np.uint8, np.uint16, np.int16, np.uint32, np.int32, np.float32, np.float64, np.int8, np.float16)
TIFFS = list(itertools.product(TYPES, LAYOUTS, (False, True), (1, 8), (1, 6)))


def check_tiff(kind, layout, planar, compression, orientation):
    """One TIFF: its pixels by the table of docs/how_to/your_own_data.md, or a refusal that names its bands and bits."""
    bands, photometric, extra = layout
    random = np.random.default_rng(bands).bytes(np.dtype(kind).itemsize * bands * SIZE[0] * SIZE[1])
    values = np.frombuffer(random, kind).reshape(*SIZE, bands)
    layouts = {"photometric": photometric, "extra": extra, "planar": planar, "compression": compression}
    try:
        image = decode_image(tiff(values, **layouts, orientation=orientation))
    except ImageError as error:
        refusal = str(error)
    else:
        whole = values.astype(np.int64)
        eight = whole & 255 if values.itemsize == 1 else whole.clip(0, 65535) >> 8
        if photometric == 0 and values.itemsize == 1:  # white is zero; Pillow turns it over for 8 bits alone
            eight = 255 - eight
        assert np.array_equal(image.pixels, eight[:, :, :3] if photometric == 2 else grey(eight[:, :, 0]))
        loses = (values.itemsize > 1 or values.dtype.kind == "i") + (bands > (3 if photometric == 2 else 1))
        assert len(image.losses) == loses
        return "read"
    named = "floating point numbers" in refusal or f"a TIFF of {bands} x {values.itemsize * 8} bits (" in refusal
    assert named or (layout == (5, 2, (2, 0)) and planar and compression == 8), refusal
    return "refused"


def test_a_tiff_of_any_layout_is_read_right_or_refused_by_its_bands_and_bits():
    found = Counter(check_tiff(*each) for each in TIFFS)
    assert found.total() == 936
    assert found["read"] > 120
