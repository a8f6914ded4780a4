"""How fast the bytes of images come: which files a list names, and how long shards take from a server to the cache."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spark_fast.errors import SettingsError
from spark_fast.pipelines.build import open_source
from spark_fast.pipelines.options import LoaderOptions
from spark_fast.pipelines.sampler import Sampler
from spark_fast.pipelines.sources.file_list import list_source
from spark_fast.pipelines.sources.remote.prefetch import DOWNLOADS, plan
from spark_fast.pipelines.sources.remote.remote_shards import RemoteShardSource, in_gb
from spark_fast.pipelines.sources.shard_format import ShardFile
from spark_fast.pipelines.sources.shards import ShardSource
from spark_fast.pipelines.sources.source import Source


@dataclass(frozen=True)
class Fetched:
    """What a look at a server has brought; no bytes where all the shards were in the cache before."""

    shards: int
    bytes: int
    seconds: float
    folder: Path  # of the cache


def listed_files(path: Path) -> Iterator[Path] | None:
    """The files that a file list names; None where the path is something else. Raises DataError for a broken list."""
    if not path.is_file() or path.suffix in (".tar", ".beton"):
        return None
    source = list_source(path)
    return (source.root / os.fsdecode(source.path(i)) for i in range(len(source)))


def reading_order(source: Source, options: LoaderOptions) -> NDArray[np.int64]:
    """The samples as a pipeline with these options reads them first, (n,)."""
    shards = source.shards() if isinstance(source, ShardSource) else None
    sampler = Sampler(len(source), options.batch_size, options.seed, block=options.view.shuffle_block, shards=shards)
    permutation = sampler.permutation(0)
    assert permutation is not None  # it shuffles
    return permutation


def fetch_sample(url: str, options: LoaderOptions, size: int) -> Fetched:
    """Fetch the shards that a pipeline with these options reads first, until they are `size` bytes.

    As many at a time as in training. Raises DataError and SettingsError as `build_pipeline` does.
    """
    with ThreadPoolExecutor(DOWNLOADS) as threads, closing(open_source(url, options)) as source:
        assert isinstance(source, RemoteShardSource)
        sample = _first_shards(source, options, size)
        wanted = [shard for shard in sample if not source.cache.holds(shard)]
        begun = time.perf_counter()
        for _ in threads.map(source.fetch, wanted):
            pass
        seconds = time.perf_counter() - begun
    count = len(wanted) or len(sample)
    return Fetched(count, sum(shard.bytes for shard in wanted), seconds, source.cache.folder)


def _first_shards(source: RemoteShardSource, options: LoaderOptions, size: int) -> list[ShardFile]:
    """Those of the first samples, until they are `size` bytes or the cache is full."""
    shards = [source.files[k] for k in plan(source.shards()[reading_order(source, options)]).shards.tolist()]
    total = np.cumsum([shard.bytes for shard in shards])
    if total[0] > source.cache.size:
        raise SettingsError(
            f"a shard of {source.folder} has {in_gb(shards[0].bytes)}, more than --cache_size {options.cache_size}"
        )
    enough = int(np.searchsorted(total, size)) + 1
    return shards[: min(enough, int(np.searchsorted(total, source.cache.size, "right")))]
