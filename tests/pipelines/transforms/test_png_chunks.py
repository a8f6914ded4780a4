"""Text and profiles in a PNG."""

from __future__ import annotations

import io
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.decode import decode_image
from spark_fast.pipelines.transforms.png_chunks import without_text
from tests.pipelines.pictures import encoded, jpeg, picture

RGB = Image.fromarray(picture(1))


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def with_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    return png[:33] + chunk(kind, content) + png[33:]


@pytest.mark.parametrize(
    ("kind", "head"),
    [(b"zTXt", b"Comment\0\0"), (b"iTXt", b"Comment\0\1\0en\0\0"), (b"iCCP", b"profile\0\0")],
)
def test_text_and_profiles_of_any_size_are_skipped_and_never_unpacked(kind, head):
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(16)) + packer.flush()  # of 16 MB
    data = with_chunk(encoded(RGB, "PNG"), kind, head + packed)
    tracemalloc.start()
    assert np.array_equal(decode_image(data).pixels, RGB)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_the_reported_file_with_a_large_text_is_read(shared_reports):
    data = (shared_reports / "png-large-text" / "png_big_ztxt.png").read_bytes()
    expected = Image.open(io.BytesIO(without_text(data))).convert("RGB")
    assert np.array_equal(decode_image(data).pixels, expected)


def test_all_else_stays():
    text = PngInfo()
    text.add_text("a", "b")
    palette = encoded(RGB.convert("P"), "PNG", pnginfo=text, transparency=bytes(range(256)), dpi=(72, 72))
    assert without_text(palette) == encoded(RGB.convert("P"), "PNG", transparency=bytes(range(256)), dpi=(72, 72))
    for data in (jpeg(1), encoded(RGB, "PNG"), encoded(RGB, "PNG")[:-9], b""):
        assert without_text(data) == data


def test_a_damaged_picture_is_refused_as_ever():
    data = bytearray(with_chunk(encoded(RGB, "PNG"), b"tEXt", b"a\0b"))
    data[data.index(b"IDAT") + 50] ^= 1
    with pytest.raises(ImageError, match="not a readable image"):
        decode_image(bytes(data))
