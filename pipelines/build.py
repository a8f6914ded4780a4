"""From a data path and options to a pipeline; what does not fit together is refused before an image is read."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from spark_fast.errors import DataError, SettingsError
from spark_fast.pipelines.backends.backend import Backend
from spark_fast.pipelines.backends.dali import DaliPipeline
from spark_fast.pipelines.backends.ffcv import FfcvPipeline
from spark_fast.pipelines.backends.measure import measure
from spark_fast.pipelines.backends.synthetic import SyntheticPipeline
from spark_fast.pipelines.backends.torch_pipeline import TorchPipeline
from spark_fast.pipelines.base import Pipeline
from spark_fast.pipelines.ffcv_install import require_ffcv
from spark_fast.pipelines.options import LoaderOptions, bytes_of
from spark_fast.pipelines.sampler import Sampler
from spark_fast.pipelines.sources.beton import RAW, BetonSource, find_beton
from spark_fast.pipelines.sources.detect import detect_source, has_split
from spark_fast.pipelines.sources.folder import FileSource
from spark_fast.pipelines.sources.listing.image_names import BAND_EXTENSIONS, IMAGE_EXTENSIONS
from spark_fast.pipelines.sources.remote.prefetch import PrefetchingSampler, check_cache
from spark_fast.pipelines.sources.remote.remote_shards import RemoteShardSource
from spark_fast.pipelines.sources.remote.remote_shards import has_split as has_remote_split
from spark_fast.pipelines.sources.remote.shard_cache import ShardCache, default_folder
from spark_fast.pipelines.sources.remote.url import is_remote
from spark_fast.pipelines.sources.shards import ShardSource
from spark_fast.pipelines.sources.source import Source
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from spark_fast.pipelines.transforms.decode import MEGAPIXEL

logger = logging.getLogger("spark_fast.pipelines")


def build_pipeline(data_path: str | Path | None, options: LoaderOptions) -> Pipeline:
    """A pipeline over the images at `data_path`, anything that `detect_source` knows, for one rank.

    Raises DataError when the data cannot be used, and SettingsError when there is no data path, or the pipeline asked
    for is not installed.
    """
    if options.pipeline == "synthetic":
        sampler = make_sampler(options, options.synthetic_samples, "synthetic_samples")
        return SyntheticPipeline(sampler, options.size, options.device, options.dtype, options.in_chans)
    source = open_source(data_path, options)
    try:
        options = _with_statistics(source, options)
        sampler = make_sampler(options, len(source), str(data_path), source)
        return _backend(source, options)(source, sampler, options)
    except BaseException:
        source.close()
        raise


def measure_statistics(data_path: str | Path | None, options: LoaderOptions) -> Statistics | None:
    """The statistics by which `build_pipeline` normalises these images; one rank measures them, and all use them."""
    if options.photographs or options.pipeline == "synthetic":
        return None
    source = open_source(data_path, options)
    try:
        return _with_statistics(source, options).statistics
    finally:
        source.close()


def _with_statistics(source: Source, options: LoaderOptions) -> LoaderOptions:
    """The options with statistics, measured if they have none, and none for photographs."""
    if options.photographs:
        return replace(options, statistics=None)
    scale, statistics = options.scale, options.statistics
    if isinstance(source, ShardSource) and source.in_chans:
        options = replace(
            options, channels_first=False, npz_key=""
        )  # a record is one (H, W, C), whatever the files were
        if statistics is None and (statistics := source.statistics.get(scale)):
            logger.info("%s: the statistics are those of the conversion, --scale %s", source.folder, scale)
    if statistics is None:
        statistics = measure(source, options.expected, scale, workers=options.workers)
    if len(statistics.mean) != options.in_chans:
        raise SettingsError(f"statistics of {len(statistics.mean)} channels do not fit in_chans {options.in_chans}")
    statistics = replace(statistics, mean=options.mean or statistics.mean, std=options.std or statistics.std)
    return replace(options, statistics=statistics)


def choose_pipeline(source: Source) -> tuple[str, str]:
    """The fastest installed pipeline for these data, as benchmarks/README.md measures them, and why it is that one."""
    if isinstance(source, BetonSource) and (source.checks["mode"] == RAW).any():
        try:
            require_ffcv("reading the raw pixels of this .beton")
        except SettingsError as error:
            return "torch", str(error)
        return "ffcv", "it reads the raw pixels of this .beton"
    return "torch", "it decodes JPEGs faster than the others on a CPU"


def open_source(data_path: str | Path | None, options: LoaderOptions) -> Source:
    """The encoded images of a pipeline, for the caller to close; raises as `build_pipeline` does."""
    if data_path is None:
        raise SettingsError("no data_path: give a folder of images, class folders or shards, or a file list")
    if is_remote(data_path):
        return _remote_source(data_path, options)
    if options.pipeline == "ffcv":
        return BetonSource(find_beton(data_path, options.view.split))
    endings = IMAGE_EXTENSIONS if options.photographs else BAND_EXTENSIONS
    source = detect_source(data_path, options.view.split, endings)
    if isinstance(source, ShardSource):
        _check_channels(source, options)
    if isinstance(source, FileSource):
        source.allow_pixels(options.max_pixels * MEGAPIXEL * (1 if options.photographs else options.in_chans))
    return source


def _remote_source(url: str, options: LoaderOptions) -> RemoteShardSource:
    if options.pipeline == "ffcv":
        raise SettingsError(f"pipeline ffcv reads a .beton on a disk, not {url}: use pipeline torch, or copy the data")
    folder = Path(options.cache_dir).expanduser() if options.cache_dir else default_folder()
    source = RemoteShardSource(url, options.view.split, ShardCache(folder, bytes_of(options.cache_size)))
    _check_channels(source, options)
    return source


def holds_split(data_path: str, split: str) -> bool:
    """Whether a data path, or a URL, holds a folder of this name, or tars that are this split by their names."""
    if is_remote(data_path):
        return has_remote_split(data_path, split)
    return has_split(Path(data_path).expanduser(), split)


def _check_channels(source: ShardSource, options: LoaderOptions) -> None:
    """Raise SettingsError where images that were stored losslessly are asked for as others."""
    if source.in_chans and (options.photographs or options.in_chans != source.in_chans):
        flags = f"--in_chans {source.in_chans}" + (
            " --scale dtype, or percentile or none" if source.in_chans == 3 else ""
        )
        raise SettingsError(
            f"{source.folder} holds images of {source.in_chans} channels, stored losslessly: use {flags}"
        )


def _backend(source: Source, options: LoaderOptions) -> type[Backend]:
    pipeline = options.pipeline
    if pipeline == "auto":
        pipeline, why = _only_pipeline(options) or choose_pipeline(source)
        logger.info("pipeline %s: %s", pipeline, why)
    if pipeline == "torch" and options.decode_on == "device":
        from spark_fast.pipelines.backends.nvjpeg import DeviceDecodePipeline  # torchvision: 90 MB that others spare

        return DeviceDecodePipeline
    if pipeline == "torch":
        return TorchPipeline
    return FfcvPipeline if pipeline == "ffcv" else DaliPipeline


def _only_pipeline(options: LoaderOptions) -> tuple[str, str] | None:
    """The pipeline that can do alone what is asked for, and why; None: the data decide."""
    if options.on_device:
        return "torch", "it can use the device for decoding and augmentation"
    if not options.photographs:
        return "torch", "it reads any number of channels and any depth"
    return ("torch", "it supports --vflip and --rot90") if options.view.vflip or options.view.rot90 else None


def make_sampler(options: LoaderOptions, num_samples: int, where: str, source: Source | None = None) -> Sampler:
    """Which samples a pipeline with these options reads at which step; `where`: the data path, for messages.

    Raises DataError when an epoch has no step, and SettingsError when `shuffle_block` or the cache do not fit.
    """
    view = options.view
    if view.shuffle_block and not isinstance(source, ShardSource):
        raise SettingsError(f"shuffle_block is for shards, which {where} is not: convert it, or use shuffle_block 0")
    sampler = Sampler(
        num_samples,
        options.batch_size,
        options.seed,
        options.rank,
        options.world_size,
        repeats=view.repeats,
        in_order=view.in_order,
        block=view.shuffle_block,
        shards=source.shards() if view.shuffle_block and isinstance(source, ShardSource) else None,
    )
    if isinstance(source, RemoteShardSource):
        check_cache(source, sampler, options.prefetch)
        sampler = PrefetchingSampler.of(sampler, source, held=max(options.prefetch, 1) + 1)
    if not len(sampler):
        raise DataError(
            f"a global batch of {options.batch_size} is larger than the {num_samples} images of {where}:"
            f" an epoch would have no step. Use a batch_size of {num_samples} or less, or more data."
        )
    return sampler
