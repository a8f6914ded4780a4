"""Which files a list names, and which shards are fetched to tell a server's speed."""

import pytest

from spark_fast.cli.storage_speed import fetch_sample, listed_files, reading_order
from spark_fast.errors import DataError, SettingsError
from spark_fast.pipelines.build import build_pipeline, open_source
from spark_fast.pipelines.options import LoaderOptions, View
from tests.pipelines.pictures import jpeg
from tests.pipelines.sources.ten_images import write_all


def test_a_list_stands_for_its_files(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/x.jpg", "y.jpg"):
        (tmp_path / name).write_bytes(jpeg(1))
    (tmp_path / "list.txt").write_text("a/x.jpg 1\ny.jpg 0\n")
    found = listed_files(tmp_path / "list.txt")
    assert found is not None
    assert list(found) == [tmp_path / "a" / "x.jpg", tmp_path / "y.jpg"]


@pytest.mark.parametrize("name", ["", "one.tar", "one.beton", "gone"])
def test_what_is_no_list_stands_for_itself(tmp_path, name):
    if "." in name:
        (tmp_path / name).touch()
    assert listed_files(tmp_path / name) is None


def test_a_list_of_files_that_are_gone_is_an_error(tmp_path):
    (tmp_path / "list.txt").write_text("x.jpg\n")
    with pytest.raises(DataError, match="do not exist"):
        listed_files(tmp_path / "list.txt")


@pytest.fixture
def url(tmp_path):
    """Of three shards of 20480, 10240 and 20480 bytes."""
    pytest.importorskip("fsspec")
    return f"file://{write_all(tmp_path / 'shards')}"


def options(tmp_path, cache_size="50GB", block=1):
    return LoaderOptions(2, cache_dir=str(tmp_path / "cache"), cache_size=cache_size, view=View(shuffle_block=block))


@pytest.mark.parametrize("block", [0, 1])
def test_the_sample_is_what_a_pipeline_reads_first(url, tmp_path, block):
    asked = options(tmp_path, block=block)
    source, pipeline = open_source(url, asked), build_pipeline(url, asked)
    ids = [i for batch in pipeline.epoch(0) for i in batch.ids.tolist()]
    assert ids == reading_order(source, asked).tolist()
    pipeline.close()
    source.close()


def test_shards_are_fetched_until_they_are_enough(url, tmp_path):
    source = open_source(url, options(tmp_path))
    first = source.files[source.shards()[reading_order(source, options(tmp_path))[0]]]
    found = fetch_sample(url, options(tmp_path), 1)
    assert (found.shards, found.bytes, found.folder) == (1, first.bytes, tmp_path / "cache")
    assert found.seconds > 0
    assert [path.name for path in found.folder.iterdir() if not path.suffix and path.name != "lock"].count(first.sha256)
    assert fetch_sample(url, options(tmp_path), 1).bytes == 0, "it is there now"
    found = fetch_sample(url, options(tmp_path), 10**9)
    assert (found.shards, found.bytes) == (2, 51200 - first.bytes)
    source.close()


def test_no_more_is_fetched_than_the_cache_holds(url, tmp_path):
    assert fetch_sample(url, options(tmp_path, "31kB"), 10**9).shards < 3
    with pytest.raises(SettingsError, match=r"a shard of file://.* has .*, more than --cache_size 9kB"):
        fetch_sample(url, options(tmp_path, "9kB"), 10**9)
