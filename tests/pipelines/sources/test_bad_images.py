"""A raw folder as people have them: every kind of odd and damaged file, met in training."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spark_fast.errors import DataError
from tests.pipelines.building import build
from tests.pipelines.pictures import encoded, jpeg, picture

RGB = Image.fromarray(picture(1))
READABLE = {  # name: (bytes, whether it counts as converted)
    "alpha.JPEG": (encoded(RGB.convert("RGBA"), "PNG"), True),
    "cmyk.JPEG": (encoded(RGB.convert("CMYK"), "JPEG", quality=95), True),
    "grey.JPEG": (encoded(RGB.convert("L"), "JPEG"), True),
    "narrow.JPEG": (jpeg(2, 1000, 20), False),
    "pixel.JPEG": (jpeg(3, 1, 1), False),
    "png.JPEG": (encoded(RGB, "PNG"), True),
    "progressive.JPEG": (encoded(RGB, "JPEG", progressive=True), False),
    "sixteen.JPEG": (encoded(Image.fromarray(np.full((40, 40), 30000, np.uint16)), "PNG"), True),
    "wide.JPEG": (jpeg(4, 20, 1000), False),
}
UNREADABLE = {
    "bad_empty.JPEG": b"",
    "bad_garbage.JPEG": b"\xff\xd8\xff" + bytes(range(200)),
    "bad_half.JPEG": jpeg(5)[:400],
    "bad_html.JPEG": b"<html>not found</html>",
}


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    for name, (data, _) in READABLE.items():
        (tmp_path / name).write_bytes(data)
    for name, data in UNREADABLE.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_readable_ones_are_counted_and_unreadable_ones_replaced_and_named(zoo, caplog):
    pipeline = build(zoo, batch_size=13, input_size=64, augment=False)
    with caplog.at_level(logging.WARNING, "spark_fast.pipelines"):
        (first,) = pipeline.epoch(0)
        (second,) = pipeline.epoch(1)
    names = sorted([*READABLE, *UNREADABLE])
    assert sorted(first.ids.tolist()) == list(range(13))  # the ids asked for, replaced or not
    assert pipeline.bad_images.read == 26
    stand_in = "cmyk.JPEG"  # the readable one after the bad ones; it counts as converted each time
    converted = sum(c for _, c in READABLE.values()) + len(UNREADABLE) * READABLE[stand_in][1]
    assert pipeline.bad_images.converted == 2 * converted
    assert pipeline.bad_images.substituted == 2 * len(UNREADABLE)
    assert len(pipeline.bad_images.first_substituted) == len(UNREADABLE)  # each once
    for name in UNREADABLE:
        assert sum(f"({name}) is unreadable" in record.getMessage() for record in caplog.records) == 1
    image = {names[i]: pixels for i, pixels in zip(first.ids.tolist(), first.images, strict=True)}
    assert all(torch.equal(image[name], image[stand_in]) for name in UNREADABLE)
    assert torch.equal(first.images[first.ids.argsort()], second.images[second.ids.argsort()])
    pipeline.close()


def deep_folder(root: Path, count: int) -> Path:
    """Every third image of 16 bits, every sixth dark; every seventh cannot be read; every tenth has a fourth band."""
    root.mkdir()
    for i in range(count):
        data = jpeg(i, 8, 8)
        if i % 3 == 0:
            data = encoded(Image.fromarray(np.full((8, 8), 4095 if i % 6 == 0 else 50000, np.uint16)), "PNG")
        elif i % 10 == 1:
            data = encoded(Image.fromarray(np.full((8, 8, 4), 77, np.uint8)), "PNG")
        (root / f"{i:04d}.png").write_bytes(b"broken" if i % 7 == 0 else data)
    return root


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "see docs/how_to/your_own_data.md" in r.getMessage()]


@pytest.mark.parametrize("decode", ["host", "device"])
def test_what_the_images_lose_is_told_once_at_the_end_of_the_first_epoch(tmp_path, caplog, decode):
    readable = [i for i in range(60) if i % 7]
    deep, dark = sum(i % 3 == 0 for i in readable), sum(i % 6 == 0 for i in readable)
    bands = sum(i % 3 != 0 and i % 10 == 1 for i in readable)
    pipeline = build(deep_folder(tmp_path / "in", 60), batch_size=20, input_size=32, pipeline="torch", decode_on=decode)
    with caplog.at_level(logging.WARNING, "spark_fast.pipelines"):
        batches = pipeline.epoch(0)
        next(batches), next(batches)
        assert told(caplog) == []
        next(batches)  # the trainer takes no more than the last one
        batches.close()
        so_far = "of the 60 images read so far are"
        assert told(caplog) == [
            f"{deep} {so_far} 16-bit grey (I;16); only their upper 8 bits are read, {dark} of them"
            " are darker than level 16 of 255: rescale them first, or train with --in_chans 1, which reads them whole,"
            " see docs/how_to/your_own_data.md",
            f"{bands} {so_far} RGB with a fourth band (RGBA); it is dropped as transparency: if it"
            " holds data, such as near infrared, choose three bands first, or train with as many --in_chans as there"
            " are, see docs/how_to/your_own_data.md",
        ]
        list(pipeline.epoch(1))
    assert len(told(caplog)) == 2
    pipeline.close()


def test_a_long_epoch_tells_it_after_a_thousand_images_too(tmp_path, caplog):
    root = tmp_path / "in"
    root.mkdir()
    deep = encoded(Image.fromarray(np.full((4, 4), 4095, np.uint16)), "PNG")
    for i in range(1200):
        (root / f"{i:04d}.png").write_bytes(deep)
    pipeline = build(root, batch_size=200, input_size=32)
    with caplog.at_level(logging.WARNING, "spark_fast.pipelines"):
        counts = [len(told(caplog)) for _ in pipeline.epoch(0)]
    assert counts == [0, 0, 0, 0, 1, 2]
    assert [text.split(" are ")[0] for text in told(caplog)] == [
        "1000 of the 1000 images read so far", "1200 of the 1200 images read so far"
    ]  # fmt: skip
    pipeline.close()


def test_images_of_a_kind_that_is_not_read_do_not_put_the_storage_in_question(tmp_path):
    for i in range(20):
        np.save(tmp_path / f"{i:02d}.npy", np.zeros(3))
    (tmp_path / "list.txt").write_text("".join(f"{i:02d}.npy\n" for i in range(20)))
    pipeline = build(tmp_path / "list.txt", batch_size=20, input_size=32)
    with pytest.raises(DataError) as refused:
        list(pipeline.epoch(0))
    pipeline.close()
    said = str(refused.value)
    assert (
        ".npy) cannot be read (not a readable image but a NumPy array (.npy), a kind that is not supported; supported"
        in said
    )
    assert "docs/how_to/your_own_data.md), and neither can the 16 images after it" in said
    assert "storage" not in said
