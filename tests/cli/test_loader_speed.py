"""What the doctor says of a loader's speed: measured on real pipelines, and what follows from the figures."""

from dataclasses import replace

import numpy as np
import pytest
import tifffile

from spark_fast.cli import loader_speed as measured
from spark_fast.cli.loader_speed import LoaderSpeed, loader_speed
from spark_fast.errors import DataError
from spark_fast.pipelines.options import LoaderOptions, View
from tests.pipelines.pictures import jpeg
from tests.pipelines.sources.ten_images import JPEGS, write_all

MS = 1e-3


def speed(reading: float, decoding: float, resizing: float, pixels: float = 256 * 341, rate: float = 100.0):
    return LoaderSpeed(reading * MS, decoding * MS, resizing * MS, rate, 2, bytes=1e5, pixels=pixels)


def from_a_server(found: LoaderSpeed):
    return replace(found, remote=True)


@pytest.mark.parametrize(
    ("found", "disk", "limit", "remedy"),
    [
        (speed(1, 2, 1), 5e6, "the storage: 50 images/s", "faster disk"),
        (speed(5, 2, 1), 5e8, "reading", "local disk"),
        (speed(1, 5, 1, pixels=3 * 256 * 341), 5e8, "decoding", "3.0 times fewer pixels"),
        (speed(1, 5, 1), 5e8, "decoding", "--decode device"),
        (speed(1, 2, 5), None, "resizing", "--augment device"),
        (from_a_server(speed(1, 2, 1)), 5e6, "the server: 50 images/s", "--cache_size room for all shards"),
        (from_a_server(speed(5, 2, 1)), None, "reading", "--cache_dir"),
    ],
)
def test_the_slowest_part_is_named_with_a_remedy(found, disk, limit, remedy):
    what, advice = found.limit(disk)
    assert what == limit
    assert remedy in advice


def test_one_core_does_its_parts_one_after_the_other():
    assert speed(1, 2, 2).of_one_core == pytest.approx(200)


def test_photographs_are_measured(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i, height=40, width=50))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    found = loader_speed(tmp_path, LoaderOptions(8, input_size=32, workers=1, max_bad_fraction=1.0))
    assert found.pixels == 40 * 50
    assert found.bytes == pytest.approx(np.mean([len(jpeg(i, height=40, width=50)) for i in range(3)]))
    assert found.reading > 0
    assert found.decoding > 0
    assert found.rate > 0


def test_bands_are_measured(tmp_path):
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 4000, (20, 30, 5), np.uint16)
        tifffile.imwrite(tmp_path / f"{i}.tif", pixels, photometric="minisblack", planarconfig="contig")
    found = loader_speed(tmp_path, LoaderOptions(2, in_chans=5, input_size=16, workers=2))
    assert found.pixels == 600
    assert found.workers == 2


def test_shards_on_a_server_are_measured(tmp_path):
    pytest.importorskip("fsspec")
    url = f"file://{write_all(tmp_path / 'shards')}"
    options = LoaderOptions(2, input_size=32, workers=1, cache_dir=str(tmp_path / "cache"), view=View(shuffle_block=1))
    found = loader_speed(url, options)
    assert found.remote
    assert found.bytes == pytest.approx(np.mean([len(jpeg) for jpeg in JPEGS]))
    assert found.rate > 0


def test_the_sample_ends_early_where_images_are_slow(monkeypatch):
    monkeypatch.setattr(measured, "SECONDS", -1.0)
    assert list(measured._for_a_while([3, 1, 2])) == [3]


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of 1 images .*broken.jpg: not a readable image"):
        loader_speed(tmp_path, LoaderOptions(8, max_bad_fraction=1.0))
