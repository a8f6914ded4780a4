"""Which JPEGs are taken, in every chroma layout, and what is said of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from spark_fast.errors import ImageError
from spark_fast.pipelines.transforms.decode import decode_image
from tests.pipelines.djpeg import exit_code
from tests.pipelines.layouts import KNOWN, UNKNOWN, layout_jpeg, scan_start
from tests.pipelines.pictures import encoded, jpeg, picture


def as_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("layout", [*KNOWN, *UNKNOWN])
def test_every_chroma_layout_shows_pillows_pixels_and_is_refused_when_its_scan_is_cut(layout, progressive):
    data = layout_jpeg(layout, progressive=progressive)
    pixels, what, _ = decode_image(data)
    assert np.array_equal(pixels, as_pillow(data))
    assert what == (f"JPEG of chroma layout {layout}, stored as 4:2:0" if layout in (*UNKNOWN, "1x4,1x1,1x1") else None)
    start = scan_start(data)
    with pytest.raises(ImageError, match="damaged JPEG: Corrupt JPEG data"):
        decode_image(data[: start + 8] + data[start + 60 :])
    with pytest.raises(ImageError, match="damaged JPEG: Premature end of JPEG file"):
        decode_image(data[:-2])


def test_what_jpegtran_makes_of_a_cameras_411_is_read(shared_reports):
    pixels, what, _ = decode_image((shared_reports / "jpeg-441" / "rotated-411.jpg").read_bytes())
    assert pixels.shape == (160, 120, 3)
    assert pixels.mean((0, 1)) == pytest.approx([134.799, 121.916, 121.720], abs=5e-4)
    assert what == "JPEG of chroma layout 1x4,1x1,1x1, stored as 4:2:0"


def destroyed() -> bytes:
    """A sound header, and 200 bytes of the scan overwritten."""
    y, x = np.mgrid[:128, :128]
    rgb = np.stack([x * 2, y * 2, (x + y) % 256], -1).astype(np.uint8)
    good = encoded(Image.fromarray(rgb), "JPEG", quality=90)
    at = good.index(b"\xff\xda") + 200
    return good[:at] + bytes(range(1, 200)) + good[at + 199 :]


def with_junk_before_its_table(data: bytes) -> bytes:
    table = data.index(b"\xff\xdb")
    return data[:table] + b"\0\0" + data[table:]


def test_a_warning_about_the_header_does_not_hide_a_destroyed_scan():
    with pytest.raises(ImageError, match=r"damaged JPEG: Corrupt JPEG data"):
        decode_image(destroyed())
    for data in (destroyed(), jpeg(1)):
        with pytest.raises(ImageError, match="2 extraneous bytes before marker 0xdb"):
            decode_image(with_junk_before_its_table(data))


def with_revision(data: bytes) -> bytes:
    at = data.index(b"JFIF\0") + 5
    return data[:at] + b"\x09" + data[at + 1 :]


def with_zeros_for_constants(data: bytes) -> bytes:
    start = scan_start(data)
    return data[: start - 3] + bytes(3) + data[start:]


def with_spare_bytes(data: bytes, spare: bytes = bytes(214)) -> bytes:
    return data[:-2] + spare + data[-2:]


def with_broken_profile(data: bytes) -> bytes:
    """A second part of a profile of one."""
    return data[:2] + b"\xff\xe2\0\x14ICC_PROFILE\0\x02\x01abcd" + data[2:]


HARMLESS = {
    with_revision: "unknown JFIF revision number 9.01",
    with_zeros_for_constants: "Invalid SOS parameters for sequential JPEG",
    with_spare_bytes: "extraneous bytes before marker 0xd9",
    with_broken_profile: "bad ICC marker",
}
SOUND = {
    "4:2:0": jpeg(1),
    "grey": encoded(Image.fromarray(picture(1)).convert("L"), "JPEG"),
    "unknown layout": layout_jpeg("3x2,1x1,1x1"),
}


@pytest.mark.parametrize("kind", SOUND)
@pytest.mark.parametrize("fault", HARMLESS)
def test_a_fault_that_spares_the_pixels_is_mended_and_named_and_hides_no_other(fault, kind):
    sound = SOUND[kind]
    pixels, what, _ = decode_image(fault(sound))
    assert np.array_equal(pixels, as_pillow(sound))
    reason = HARMLESS[fault] if kind != "unknown layout" else "chroma layout 3x2,1x1,1x1"
    assert reason in what
    half = scan_start(sound) + 30
    with pytest.raises(ImageError, match="damaged JPEG: Corrupt JPEG data"):
        decode_image(fault(sound[:half] + bytes(range(60)) + sound[half + 60 :]))


def test_parameters_of_a_scan_are_mended_only_if_they_are_the_zeros_that_some_encoders_write():
    start = scan_start(jpeg(1))
    with pytest.raises(ImageError, match="Invalid SOS parameters"):
        decode_image(jpeg(1)[: start - 3] + jpeg(1)[start - 2 :])  # the scan's first byte is taken for the last of them
    with pytest.raises(ImageError, match="Invalid SOS parameters"):
        decode_image(jpeg(1)[: start - 3] + bytes(6) + jpeg(1)[start + 3 :])  # a part of the file was set to zero


@pytest.mark.parametrize(
    "spare", [bytes(5), bytes(214), b"\xaa" * 50, np.random.default_rng(1).bytes(300).replace(b"\xff", b"")]
)
@pytest.mark.parametrize("data", [jpeg(1), layout_jpeg("3x1,1x1,1x1"), layout_jpeg("2x2,1x1,1x1", restarts=2)])
def test_spare_bytes_before_the_end_mark_are_skipped(data, spare):
    assert np.array_equal(decode_image(with_spare_bytes(data, spare)).pixels, decode_image(data).pixels)


def test_the_reported_file_with_spare_bytes_has_the_same_pixels(shared_reports):
    files = [(shared_reports / "jpeg-extra-before-eoi" / f"{name}.jpg") for name in ("extra_before_eoi", "same-pixels")]
    spare, same = (decode_image(file.read_bytes()).pixels for file in files)
    assert np.array_equal(spare, same)


@pytest.mark.parametrize("layout", ["2x2,1x1,1x1", "3x1,1x1,1x1"])
def test_bytes_before_a_restart_marker_are_no_spare_bytes(layout):
    data = layout_jpeg(layout, restarts=2)
    at = data.index(b"\xff\xd0")
    with pytest.raises(ImageError, match="extraneous bytes before marker 0xd0"):
        decode_image(data[:at] + bytes(30) + data[at:])


@pytest.mark.parametrize("layout", ["2x2,1x1,1x1", "3x1,1x1,1x1"])
def test_the_rest_of_a_scan_that_seems_to_end_early_is_no_spare_bytes(layout):
    data = layout_jpeg(layout, mcus=12)
    lower = data.index(b"\xff\xc0") + 5
    height = int.from_bytes(data[lower : lower + 2], "big") * 2 // 3
    with pytest.raises(ImageError, match="extraneous bytes before marker 0xd9"):
        decode_image(data[:lower] + height.to_bytes(2, "big") + data[lower + 2 :])


def test_a_bad_huffman_code_is_seen_where_libjpegs_fast_route_takes_it_for_a_zero():
    """Sixteen ones are no code; in the middle of a large scan the fast route reads on, and ends where it should."""
    data = swallowed_bad_code()
    assert decode_image(data, judged=True).pixels.shape == (480, 480, 3)  # by the fast route
    with pytest.raises(ImageError, match="bad Huffman code"):
        decode_image(data)


def swallowed_bad_code() -> bytes:
    """A grey scan of 3600 blocks without coefficients, one of which ends with a bad code for its 1010."""
    model = encoded(Image.new("L", (480, 480), 128), "JPEG")
    blocks = ["001010"] * 3600
    blocks[400] = "00" + "1" * 17
    bits = "".join(blocks)
    bits += "1" * (-len(bits) % 8)
    scan = int("1" + bits, 2).to_bytes(len(bits) // 8 + 1, "big")[1:].replace(b"\xff", b"\xff\0")
    return model[: scan_start(model)] + scan + b"\xff\xd9"


@pytest.mark.djpeg
@pytest.mark.parametrize(
    "data", [destroyed(), with_junk_before_its_table(destroyed()), with_junk_before_its_table(jpeg(1))]
)
def test_what_is_refused_here_djpeg_refuses(data):
    assert exit_code(data) == 2
