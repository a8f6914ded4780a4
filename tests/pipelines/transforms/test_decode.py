from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms import decode as decode_module
from spark_fast.pipelines.transforms.decode import decode_image
from tests.pipelines.pictures import encoded, jpeg, picture

RGB = Image.fromarray(picture(1))
GREY16 = Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13)
EXIF = Image.Exif()
EXIF[0x0112] = 6  # orientation: turn by 90 degrees

ODD = {
    "grey": encoded(RGB.convert("L"), "JPEG"),
    "cmyk": encoded(RGB.convert("CMYK"), "JPEG"),
    "png": encoded(RGB, "PNG"),
    "palette": encoded(RGB.convert("P"), "PNG"),
    "palette with transparency": encoded(RGB.convert("P"), "PNG", transparency=bytes(range(256))),
    "alpha": encoded(RGB.convert("RGBA"), "PNG"),
    "grey with alpha": encoded(RGB.convert("LA"), "PNG"),
    "one bit": encoded(RGB.convert("1"), "PNG"),
    "webp": encoded(RGB, "WEBP"),
    "gif": encoded(RGB.convert("P"), "GIF"),
    "bmp": encoded(RGB, "BMP"),
    "tiff": encoded(RGB, "TIFF"),
}
PLAIN = {
    "baseline": encoded(RGB, "JPEG"),
    "progressive": encoded(RGB, "JPEG", progressive=True),
    "4:4:4": encoded(RGB, "JPEG", subsampling=0),
    "exif orientation is not applied": encoded(RGB, "JPEG", exif=EXIF),
    "broken exif": encoded(RGB, "JPEG", exif=b"Exif\0\0garbage"),
    "rgb colours": encoded(RGB, "JPEG", keep_rgb=True),
    "bytes after the end": encoded(RGB, "JPEG") + b"appendix" * 100,
}


@pytest.mark.parametrize("kind", [*ODD, *PLAIN])
def test_every_readable_kind_gives_the_pixels_that_pillow_gives(kind):
    data = ODD.get(kind) or PLAIN[kind]
    decoded = decode_image(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow would rather see RGBA; we look at the colours alone
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert decoded.pixels.dtype == np.uint8
    assert np.array_equal(decoded.pixels, expected)
    assert decoded.converted == (kind in ODD)
    assert np.array_equal(decode_image(memoryview(data)).pixels, decoded.pixels)


def test_sixteen_bit_grey_keeps_its_range():
    data = encoded(GREY16, "PNG")
    decoded = decode_image(data)
    assert decoded.converted
    assert np.array_equal(decoded.pixels, np.repeat((np.asarray(GREY16) >> 8)[:, :, None], 3, axis=2))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4000), (20, 1000), (1000, 20)])
def test_odd_shapes_are_read(height, width):
    assert decode_image(jpeg(0, height, width)).pixels.shape == (height, width, 3)


def bad_huffman_code(data: bytes) -> bytes:
    scan = data.index(b"\xff\xda") + 14
    return data[: scan + 40] + b"\xff\x00" * 40 + data[scan + 120 :]


BAD = {
    "zero bytes": (b"", "zero bytes"),
    "cut in half": (jpeg(1)[: len(jpeg(1)) // 2], "damaged JPEG: .*"),
    "no end marker": (jpeg(1)[:-2], "damaged JPEG: Premature end"),
    "cut in the header": (jpeg(1)[:80], "not a readable image"),
    "garbage": (bytes(range(256)) * 20, "not a readable image"),
    "html": (b"<!DOCTYPE html><title>404</title>", r"starts with b'<!DOCTYPE ht'"),
    "scan overwritten": (bad_huffman_code(jpeg(1, 200, 300)), "damaged JPEG: Corrupt JPEG data"),
    "png cut": (encoded(RGB, "PNG")[:-300], "not a readable image"),
    "grey jpeg cut": (ODD["grey"][:-300], "damaged JPEG"),
    "cmyk jpeg cut": (ODD["cmyk"][:-300], "damaged JPEG"),
    "eps is not handed to ghostscript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "not a readable",
    ),
    "float": (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating point"),
}


@pytest.mark.parametrize("kind", BAD)
def test_unreadable_images_are_refused_with_the_reason(kind):
    data, reason = BAD[kind]
    with pytest.raises(ImageError, match=reason):
        decode_image(data)


def with_size(data: bytes, height: int, width: int) -> bytes:
    """The same JPEG, lying about its size."""
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[frame + 9 :]


def test_bombs_are_refused_from_their_header():
    with pytest.raises(ImageError, match="65000 x 65000 pixels exceed the limit of 67 million"):
        decode_image(with_size(jpeg(1), 65000, 65000))
    with pytest.raises(ImageError, match=r"not a readable image|exceed the limit"):
        decode_image(encoded(Image.new("1", (20000, 10000)), "PNG"))
    with pytest.raises(ImageError, match="80 x 60 pixels exceed"):
        decode_image(ODD["png"], max_pixels=4799)
    assert decode_image(ODD["png"], max_pixels=4800).pixels.shape == (60, 80, 3)


def test_an_image_above_the_limit_is_read_when_the_limit_is_raised_as_the_message_says(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own: from twice that it refuses
    for data in (encoded(RGB, "PNG"), encoded(RGB, "TIFF"), encoded(RGB, "WEBP", lossless=True)):
        Image.MAX_IMAGE_PIXELS = 1000
        with pytest.raises(ImageError):
            decode_image(data, max_pixels=1000)
        assert Image.MAX_IMAGE_PIXELS == 1000
        assert decode_image(data, max_pixels=4800).pixels.shape == (60, 80, 3)
        assert Image.MAX_IMAGE_PIXELS == 4800
    with pytest.raises(
        ImageError, match=r"--max_pixels 4225 \(train, eval, convert\) reads it, see docs/how_to/your_own_data"
    ):
        decode_image(with_size(jpeg(1), 65000, 65000))


RAISED = (KeyError(7), struct.error("short"), OverflowError(), MemoryError(), RuntimeError(), SyntaxError("no marker"))


@pytest.mark.parametrize("error", RAISED)
@pytest.mark.parametrize("decoder", ["decode_jpeg", "_decode_with_pillow"])
def test_whatever_a_decoder_raises_refuses_the_image_alone(monkeypatch, decoder, error):
    def fail(*_args, **_settings):
        raise error

    monkeypatch.setattr(decode_module, decoder, fail)
    with pytest.raises(ImageError, match="not a readable image"):
        decode_image(jpeg(1) if decoder == "decode_jpeg" else ODD["png"])


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ImageError, match="0"):
        decode_image(b"P6 0 5 255\n")


def test_the_reason_is_a_function_of_the_bytes():
    reasons = set()
    for _ in range(3):
        with pytest.raises(ImageError) as error:
            decode_image(bytes(bytearray(b"no image at all")))
        reasons.add(str(error.value))
    assert len(reasons) == 1
    assert "0x" not in reasons.pop()
