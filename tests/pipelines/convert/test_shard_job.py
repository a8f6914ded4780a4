from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from spark_fast.errors import DataError
from spark_fast.pipelines.convert.conversion import convert
from spark_fast.pipelines.convert.shard_job import ShardJob, write_job
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.sources.shard_format import MANIFEST
from tests.pipelines.convert.test_conversion import KEEP_SIZE, settings
from tests.pipelines.pictures import encoded, jpeg, picture


def test_a_source_that_goes_away_is_not_taken_for_unreadable_images(image_folder, tmp_path):
    root = image_folder()

    def unmount(progress) -> None:
        if progress.done == 8:
            root.rename(tmp_path / "elsewhere")

    with pytest.raises(DataError, match=r"train is gone .*Finished shards are kept"):
        convert(root, tmp_path / "out", settings(), on_progress=unmount)
    assert (tmp_path / "out/train/shard-000000.tar").exists()
    assert not (tmp_path / "out/train" / MANIFEST).exists()


def test_a_job_writes_a_shard_and_a_report_of_what_is_in_it_and_what_is_not(tmp_path):
    images = {"a.jpg": jpeg(0), "b.jpg": b"", "c.jpg": encoded(Image.fromarray(picture(2)), "PNG")}
    (tmp_path / "images").mkdir()
    for name, data in images.items():
        (tmp_path / "images" / name).write_bytes(data)
    source = detect_source(tmp_path / "images")
    job = ShardJob(tmp_path / "shard-000007.tar", source, np.array([40, 7, 13]), KEEP_SIZE, {"seed": 3})
    done = []
    write_job(job, lambda count, size: done.append((count, size)))
    assert done == [(1, len(data)) for data in images.values()]
    report = json.loads((tmp_path / "shard-000007.json").read_text())
    assert [record[0] for record in report["records"]] == [40, 13]
    assert report["refused"] == [{"name": "b.jpg", "reason": "the file has zero bytes"}]
    assert [entry["name"] for entry in report["repaired"]] == ["c.jpg"]
    assert (report["shard"]["count"], report["made_from"]) == (2, {"seed": 3})
    assert job.describe(1).endswith("shard-000007.tar, image b.jpg")
    assert job.describe(3).endswith("shard-000007.tar, its end")
