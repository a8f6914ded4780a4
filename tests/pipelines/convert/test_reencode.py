"""An image as the converter stores it: its size, what is copied, what a reduction loses."""

import io

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spark_fast.errors import ImageError, SettingsError
from spark_fast.pipelines.convert.reencode import Reencode
from spark_fast.pipelines.transforms.decode import decode_image
from tests.pipelines.pictures import encoded, picture

KEEP_SIZE = Reencode(short_side=0)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 400), st.booleans())
def test_sizes_are_reduced_to_the_side_asked_for_and_never_enlarged(height, width, side, short):
    images = Reencode(short_side=side if short else 0, max_side=0 if short else side)
    h, w = images.size(height, width)
    of = min if short else max
    assert of(h, w) == (min(of(height, width), side) if side else of(height, width))
    assert h <= height
    assert w <= width
    if h > 20 and w > 20:
        assert (w / h) / (width / height) == pytest.approx(1, abs=0.06)


def test_larger_images_are_stored_as_pil_would_reduce_them():
    original = picture(1, 300, 400)
    stored, repair, *_ = Reencode(short_side=150, quality=95).reencoded(encoded(Image.fromarray(original), "PNG"))
    image = Image.open(io.BytesIO(stored))
    assert image.size == (200, 150)
    assert "not a JPEG" in (repair or "")
    assert image.info.get("progressive") is None
    expected = np.asarray(Image.fromarray(original).resize((200, 150), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(image) - expected).mean() < 2


RGB = Image.fromarray(picture(2))


@pytest.mark.parametrize(
    ("data", "copied", "repaired"),
    [
        (encoded(RGB, "JPEG"), True, False),
        (encoded(RGB, "JPEG", subsampling=0), True, False),
        (encoded(RGB, "JPEG", progressive=True), False, False),
        (encoded(RGB, "JPEG", keep_rgb=True), False, False),
        (encoded(RGB.convert("L"), "JPEG"), False, True),
        (encoded(RGB.convert("CMYK"), "JPEG"), False, True),
        (encoded(RGB, "PNG"), False, True),
    ],
)
def test_only_plain_jpegs_are_copied(data, copied, repaired):
    stored, repair, *_ = KEEP_SIZE.reencoded(data)
    assert (stored == data) == copied
    assert (repair is not None) == repaired
    pixels, what, _ = decode_image(stored)
    assert what is None
    assert np.abs(pixels.astype(int) - decode_image(data).pixels).mean() < 3
    if not copied:
        assert b"\xff\xc0" in stored  # baseline
        assert Image.open(io.BytesIO(stored)).layer[0][1:3] == (2, 2)  # 4:2:0


def test_an_image_too_long_for_a_jpeg_is_refused():
    with pytest.raises(ImageError, match="a JPEG cannot be longer than 65500"):
        KEEP_SIZE.reencoded(encoded(Image.new("RGB", (66000, 2)), "PNG"))


def test_real_images_lose_no_more_than_by_pillows_reduction_and_the_same_jpeg(imagenet_sample):
    lost = []
    for path in sorted(imagenet_sample.glob("train/*/*.JPEG"))[::8]:
        image = Image.open(path).convert("RGB")
        height, width = Reencode().size(image.height, image.width)
        reduced = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        theirs = simplejpeg.encode_jpeg(reduced, 90, "RGB", "420")
        ours = Reencode().reencoded(path.read_bytes()).content
        lost.append([np.abs(decode_image(data).pixels.astype(int) - reduced).mean() for data in (ours, theirs)])
    assert len(lost) == 20
    ours, theirs = np.mean(lost, axis=0)
    assert ours < 1.01 * theirs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"short_side": 256, "max_side": 400}, "exclude each other"),
        ({"short_side": -1}, "numbers of pixels"),
        ({"quality": 0}, "quality must be from 1 to 100"),
        ({"quality": 101}, "got 101"),
    ],
)
def test_senseless_settings_are_refused(values, message):
    with pytest.raises(SettingsError, match=message):
        Reencode(**values)
