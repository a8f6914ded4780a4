"""`decode_on="device"` with the CPU as the device: nvJPEG's part is torchvision's libjpeg, all the rest is the same."""

from __future__ import annotations

import logging

import pytest
import torch
from PIL import Image

from spark_fast.pipelines.backends import nvjpeg as device_decode
from tests.pipelines.building import build
from tests.pipelines.comparing import alike, batches, same
from tests.pipelines.pictures import encoded, jpeg, picture


@pytest.mark.parametrize("size", [32, 96])  # crops larger than a cell, and smaller
def test_batches_are_those_of_the_host(image_folder, size):
    root = image_folder()
    ours = batches(root, 1, input_size=size, decode_on="device")
    assert alike(ours, batches(root, 1, input_size=size))
    assert same(ours[2:], batches(root, 1, 2, input_size=size, decode_on="device", workers=4, prefetch=4))
    assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in ours)


def test_odd_and_damaged_images_are_met_as_on_the_host(tmp_path, caplog):
    picked = Image.fromarray(picture(1))
    odd = {"grey.jpg": encoded(picked.convert("L"), "JPEG"), "cmyk.jpg": encoded(picked.convert("CMYK"), "JPEG")}
    odd |= {"alpha.jpg": encoded(picked.convert("RGBA"), "PNG"), "cut.jpg": jpeg(2)[:-60], "empty.jpg": b""}
    for name, data in odd.items():
        (tmp_path / name).write_bytes(data)
    for i in range(5):
        (tmp_path / f"sound{i}.jpg").write_bytes(jpeg(i))
    made = {}
    for where in ("host", "device"):
        settings = {"batch_size": 10, "input_size": 64, "max_bad_fraction": 0.5}
        pipeline = build(tmp_path, decode_on=where, **settings)
        made[where] = [batch for epoch in range(2) for batch in pipeline.epoch(epoch)], pipeline.bad_images
        pipeline.close()
    ours, theirs = made["device"], made["host"]
    assert ours[1] == theirs[1]
    assert ours[1].substituted == 4
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(a.images, b.images, atol=0.2, rtol=0)
        assert (a.images - b.images).abs().mean() < 0.01


def test_what_the_decoder_refuses_though_it_is_sound_is_decoded_without_it(image_folder, caplog, monkeypatch):
    root = image_folder()
    refused = (root / "train" / "n0001" / "0011.JPEG").read_bytes()

    def picky(files, *rest):
        if any(bytes(file.numpy()) == refused for file in files):
            raise RuntimeError("nvjpegDecode failed: 8")
        return decode(files, *rest)

    decode = device_decode.decode_jpeg
    monkeypatch.setattr(device_decode, "decode_jpeg", picky)
    with caplog.at_level(logging.WARNING, "spark_fast.pipelines"):
        ours = batches(root, decode_on="device")
    (record,) = caplog.records
    assert "image 11 (n0001/0011.JPEG) is sound, but torchvision's decoder refuses it" in record.getMessage()
    assert alike(ours, batches(root))
