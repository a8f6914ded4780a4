"""A raw folder as people have them: every kind of odd and damaged file, met in training."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
