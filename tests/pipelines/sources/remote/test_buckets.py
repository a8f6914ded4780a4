"""`s3://` and `gs://`, each from a server of its own on loopback."""

from __future__ import annotations

import logging

import pytest
import torch

from spark_fast.errors import DataError
from spark_fast.pipelines.convert.conversion import ConvertSettings, convert
from spark_fast.pipelines.convert.reencode import Reencode
from spark_fast.pipelines.sources.remote.remote_shards import RemoteShardSource, has_split
from spark_fast.pipelines.sources.remote.shard_cache import ShardCache
from tests.pipelines.building import build
from tests.pipelines.comparing import batches


@pytest.fixture(params=[pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("s3", "gs")])
def bucket_of(request):
    """bucket_of(folder): a context with the URL of a bucket that has the folder's files."""
    if request.param == "s3":
        from tests.s3_server import s3_of

        return s3_of
    from tests.gs_server import gs_of

    return gs_of


def test_training_with_a_cache_of_a_tenth_sees_the_batches_of_the_disk(image_folder, tmp_path, caplog, bucket_of):
    convert(image_folder(96), tmp_path / "shards", ConvertSettings(Reencode(short_side=0), images_per_shard=3))
    local = RemoteShardSource(f"file://{tmp_path}/shards", "train", ShardCache(tmp_path / "all", 10**9))
    tenth = local.total_bytes // 10
    local.close()
    told = {"batch_size": 2, "input_size": 32, "shuffle_block": 1, "prefetch": 1, "seed": 7}
    with bucket_of(tmp_path / "shards") as url, caplog.at_level(logging.INFO):
        cache = ShardCache(tmp_path / "cache", tenth)
        here = build(tmp_path / "shards", **told)
        there = build(url, cache_dir=str(cache.folder), cache_size=str(tenth), **told)
        for epoch, start in ((0, 0), (1, 0), (2, 20)):
            for a, b in zip(here.epoch(epoch, start), there.epoch(epoch, start), strict=True):
                assert torch.equal(a.images, b.images)
                assert torch.equal(a.labels, b.labels)
                assert a.ids.tolist() == b.ids.tolist()
        assert there.classes == here.classes
        here.close()
        there.close()
        kept = [path.stat().st_size for path in cache.folder.iterdir()]
        assert 0 < sum(kept) <= tenth
    assert "never-logged" not in caplog.text


def test_what_is_not_in_the_bucket_is_named(image_folder, tmp_path, caplog, bucket_of):
    convert(image_folder(6), tmp_path / "shards", ConvertSettings(Reencode(short_side=0)))
    cache = ShardCache(tmp_path / "cache", 10**9)
    with bucket_of(tmp_path / "shards") as url:
        assert has_split(url, "train")
        assert not has_split(url, "val")
        with pytest.raises(
            DataError, match=f"{url}/manifest.json cannot be read after 3 attempts: the server has no such"
        ):
            RemoteShardSource(url, "val", cache)
        assert len(batches(url, batch_size=2, cache_dir=str(cache.folder))) == 3
