"""Odd and damaged images under DALI: it must neither stop on them nor show them grey."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import DataError, build_pipeline
from pipelines.dali_pipeline import DaliPipeline
from pipelines.shards import INDEX_FILE, Manifest, write_index, write_manifest, write_shard
from tests.pipelines.comparing import alike, needs_dali, pixels
from tests.pipelines.comparing import dali_batches as batches
from tests.pipelines.pictures import encoded, jpeg, picture
from tests.pipelines.test_bad_images import READABLE, UNREADABLE
from tests.pipelines.test_decode import ODD, PLAIN


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


@needs_dali
def test_odd_and_damaged_files_come_out_as_from_torch(tmp_path, caplog):
    for name, (data, _) in READABLE.items():
        (tmp_path / name).write_bytes(data)
    for name, data in {**UNREADABLE, "bad_tail.JPEG": jpeg(6)[:-2]}.items():
        (tmp_path / name).write_bytes(data)
    for name, data in {**ODD, **PLAIN}.items():
        (tmp_path / f"kind {name.replace(':', '')}.jpg").write_bytes(data)
    count = len(list(tmp_path.iterdir()))
    made = {}
    for kind in ("torch", "dali"):
        pipeline = build_pipeline(tmp_path, pipeline=kind, batch_size=count, input_size=64, max_bad_fraction=0.5)
        caplog.clear()
        with caplog.at_level(logging.INFO, "pipelines"):
            made[kind] = [batch for epoch in range(3) for batch in pipeline.epoch(epoch)], pipeline.problems
        messages = [record.getMessage() for record in caplog.records if "is unreadable" in record.getMessage()]
        assert len(messages) == 5  # each once, in three epochs
        assert sum("decoded without DALI" in r.getMessage() for r in caplog.records) == (kind == "dali")
        pipeline.close()
    for _, problems in made.values():
        problems.first_replaced = [re.sub("0x[0-9a-f]+", "", line) for line in problems.first_replaced]
    assert made["dali"][1] == made["torch"][1]  # read, converted, replaced, and the names with the reasons
    for ours, theirs in zip(made["dali"][0], made["torch"][0], strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist()
        difference = np.abs(pixels(ours.images) - pixels(theirs.images)).mean((1, 2, 3))
        assert difference.max() < 2.5  # dithered black and white; all others below 0.6
        assert np.sort(difference)[-2] < 0.6


@needs_dali
def test_a_damaged_record_of_a_shard_is_replaced_and_named(shards, caplog):
    settings = {"batch_size": 24, "input_size": 32, "max_bad_fraction": 0.5}
    pipeline = build_pipeline(shards, pipeline="dali", **settings)
    with caplog.at_level(logging.WARNING, "pipelines"):
        got = [batch for epoch in range(2) for batch in pipeline.epoch(epoch)]
    pipeline.close()
    other = build_pipeline(shards, **settings)
    assert alike(got, [batch for epoch in range(2) for batch in other.epoch(epoch)])
    other.close()
    assert pipeline.problems == other.problems
    assert pipeline.problems.replaced == 4
    five, seventeen = sorted(pipeline.problems.first_replaced)[::-1]
    assert five.startswith("5 shard-000000.tar:00000005-5.jpg: damaged JPEG")
    assert seventeen.startswith("17 shard-000000.tar:00000017-17.jpg: checksum differs")


@needs_dali
def test_shards_and_resume_give_what_torch_gives(shards):
    settings = {"batch_size": 4, "max_bad_fraction": 0.5}
    for start in (0, 3, 5):
        ours = batches(shards, 1, start, **settings)
        assert len(ours) == 6 - start
        assert alike(ours, batches(shards, 1, start, pipeline="torch", **settings))


@needs_dali
def test_what_dali_refuses_though_it_is_sound_is_found_named_and_decoded_without_it(image_folder, caplog):
    root = image_folder()
    marker = root / "train" / "n0001" / "0011.JPEG"
    data = marker.read_bytes()
    marker.write_bytes(data[:2] + b"\xff\x01" + data[2:])  # TEM: stands alone in a header, which DALI does not know
    pipeline = build_pipeline(root, pipeline="dali", batch_size=12, input_size=32, seed=5)
    with caplog.at_level(logging.WARNING, "pipelines"):
        got = [batch for epoch in range(3) for batch in pipeline.epoch(epoch)]
    pipeline.close()
    (record,) = caplog.records  # once, and no other image of its batch
    assert "image 11 (n0001/0011.JPEG) is sound, but DALI refuses it (nvImageCodec failure" in record.getMessage()
    assert pipeline.problems.replaced == 0
    assert alike(got, [batch for epoch in range(3) for batch in batches(root, epoch, pipeline="torch")])


@needs_dali
def test_a_file_that_changes_under_our_hands_is_judged_again(image_folder):
    root = image_folder()
    pipeline = build_pipeline(root, pipeline="dali", batch_size=24, input_size=32, max_bad_fraction=0.5)
    list(pipeline.epoch(0))
    changed = root / "train" / "n0000" / "0003.JPEG"
    changed.write_bytes(changed.read_bytes()[:-40])  # DALI would show grey, and say nothing
    list(pipeline.epoch(1))
    assert pipeline.problems.replaced == 1
    assert "3 n0000/0003.JPEG: damaged JPEG" in pipeline.problems.first_replaced[0]
    changed.write_bytes(encoded(Image.fromarray(picture(3)), "JPEG"))
    list(pipeline.epoch(2))
    assert pipeline.problems.replaced == 1
    pipeline.close()


@needs_dali
def test_too_many_bad_images_end_the_epoch_with_their_names(tmp_path):
    for i in range(50):
        (tmp_path / f"{i:02d}.jpg").write_bytes(b"broken" if i in (3, 30) else jpeg(i, 20, 20))
    pipeline = build_pipeline(tmp_path, pipeline="dali", batch_size=50, input_size=32, max_bad_fraction=0.01)
    for epoch in range(19):  # not judged before 1,000 images
        list(pipeline.epoch(epoch))
    with pytest.raises(DataError, match=r"40 of 1000 images .* max_bad_fraction = 0.01") as caught:
        list(pipeline.epoch(19))
    assert "30 30.jpg: not a readable image" in str(caught.value)
    pipeline.close()


@needs_dali
def test_an_unexpected_failure_reaches_the_consumer_with_the_images_name(image_folder):
    pipeline = build_pipeline(image_folder(), pipeline="dali", batch_size=6, input_size=32)
    assert isinstance(pipeline, DaliPipeline)
    read = pipeline._source.read

    def failing(i: int) -> bytes:
        return read(i) if i != 7 else 1 / 0  # type: ignore[return-value]

    pipeline._source.read = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"while loading image 7 \(n0000/0007.JPEG\): ZeroDivisionError"):
        list(pipeline.epoch(0))
    pipeline.close()
