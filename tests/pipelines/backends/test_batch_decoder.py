"""Odd and damaged images under decoders of whole batches: they must neither stop on them nor show them grey."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from spark_fast.pipelines.sources.shard_format import (
    INDEX_FILE,
    Manifest,
    write_index,
    write_manifest,
    write_shard,
)
from tests.pipelines.building import build
from tests.pipelines.comparing import alike, batches
from tests.pipelines.layouts import layout_jpeg
from tests.pipelines.pictures import encoded, jpeg, picture


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """24 labelled images, in two shards; number 5 has a sound checksum and a damaged scan, 17 a flipped byte."""
    folder = tmp_path / "shards"
    folder.mkdir()
    data = [jpeg(i, 50 + i % 7, 60 + i % 11) for i in range(24)]
    data[5] = data[5][: len(data[5]) // 2]
    made = [
        write_shard(folder / f"shard-{k:06d}.tar", [(i, f"{i}.JPEG", i % 3, data[i]) for i in part])
        for k, part in enumerate(([*range(1, 24, 2)], [*range(0, 24, 2)]))
    ]
    index = write_index(folder / INDEX_FILE, [records for _, records in made])
    write_manifest(folder, Manifest(24, True, ["a", "b", "c"], {}, index, [shard for shard, _ in made]))
    (record,) = [record for _, records in made for record in records if record.number == 17]
    with (folder / "shard-000000.tar").open("r+b") as file:
        file.seek(record.offset + record.size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    return folder


each_decoder = pytest.mark.parametrize(
    "decoder",
    [
        pytest.param({"pipeline": "dali"}, id="dali", marks=pytest.mark.dali),
        pytest.param({"decode_on": "device"}, id="device"),
    ],
)


@each_decoder
def test_shards_and_resume_give_what_torch_gives(shards, decoder):
    settings = {"batch_size": 4, "max_bad_fraction": 0.5}
    for start in (0, 3, 5):
        ours = batches(shards, 1, start, **settings, **decoder)
        assert len(ours) == 6 - start
        assert alike(ours, batches(shards, 1, start, **settings))


@each_decoder
def test_odd_chroma_layouts_and_harmless_faults_are_decoded_on_the_host(image_folder, decoder):
    root = image_folder(4, 1)
    odd = (layout_jpeg("1x4,1x1,1x1"), layout_jpeg("3x1,1x1,1x1"), jpeg(2)[:-2] + bytes(214) + jpeg(2)[-2:])
    for i, data in enumerate(odd):
        (root / "train" / "n0000" / f"{i:04d}.JPEG").write_bytes(data)
    settings = {"batch_size": 4, "max_bad_fraction": 0.0}
    for epoch in range(2):
        assert alike(batches(root, epoch, **settings, **decoder), batches(root, epoch, **settings))


@pytest.mark.dali
def test_what_dali_refuses_though_it_is_sound_is_found_named_and_decoded_without_it(image_folder, caplog):
    root = image_folder()
    marker = root / "train" / "n0001" / "0011.JPEG"
    data = marker.read_bytes()
    marker.write_bytes(data[:2] + b"\xff\x01" + data[2:])  # TEM: stands alone in a header, which DALI does not know
    pipeline = build(root, pipeline="dali", batch_size=12, input_size=32, seed=5)
    with caplog.at_level(logging.WARNING, "spark_fast.pipelines"):
        got = [batch for epoch in range(3) for batch in pipeline.epoch(epoch)]
    pipeline.close()
    (record,) = caplog.records  # once, and no other image of its batch
    assert "image 11 (n0001/0011.JPEG) is sound, but DALI refuses it (nvImageCodec failure" in record.getMessage()
    assert pipeline.bad_images.substituted == 0
    assert alike(got, [batch for epoch in range(3) for batch in batches(root, epoch, batch_size=12)])


@each_decoder
def test_a_file_that_changes_under_our_hands_is_judged_again(image_folder, decoder):
    root = image_folder()
    pipeline = build(root, batch_size=24, input_size=32, max_bad_fraction=0.5, **decoder)
    list(pipeline.epoch(0))
    changed = root / "train" / "n0000" / "0003.JPEG"
    changed.write_bytes(changed.read_bytes()[:-40])  # a decoder would show grey, and say nothing
    list(pipeline.epoch(1))
    assert pipeline.bad_images.substituted == 1
    assert "3 n0000/0003.JPEG: damaged JPEG" in pipeline.bad_images.first_substituted[0]
    changed.write_bytes(encoded(Image.fromarray(picture(3)), "JPEG"))
    list(pipeline.epoch(2))
    assert pipeline.bad_images.substituted == 1
    pipeline.close()
