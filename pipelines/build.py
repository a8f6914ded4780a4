"""From a data path and options to a pipeline; what does not fit together is refused before an image is read."""

from __future__ import annotations

import logging
from pathlib import Path

from spark_fast.errors import DataError, SettingsError
from spark_fast.pipelines.backends.backend import Backend
from spark_fast.pipelines.backends.dali import DaliPipeline
from spark_fast.pipelines.backends.ffcv import FfcvPipeline
from spark_fast.pipelines.backends.nvjpeg import DeviceDecodePipeline
from spark_fast.pipelines.backends.synthetic import SyntheticPipeline
from spark_fast.pipelines.backends.torch_threads import TorchPipeline
from spark_fast.pipelines.base import Pipeline
from spark_fast.pipelines.ffcv_install import require_ffcv
from spark_fast.pipelines.options import LoaderOptions
from spark_fast.pipelines.sampler import Sampler
from spark_fast.pipelines.sources.beton import RAW, BetonSource, find_beton
from spark_fast.pipelines.sources.detect import detect_source
from spark_fast.pipelines.sources.folder import FileSource
from spark_fast.pipelines.sources.source import Source
from spark_fast.pipelines.transforms.decode import MEGAPIXEL

logger = logging.getLogger("spark_fast.pipelines")


def build_pipeline(data_path: str | Path | None, options: LoaderOptions) -> Pipeline:
    """A pipeline over the images at `data_path`, anything that `detect_source` knows, for one rank.

    Raises DataError when the data cannot be used, and SettingsError when there is no data path, or the pipeline asked
    for is not installed.
    """
    if options.pipeline == "synthetic":
        sampler = _sampler(options, options.synthetic_samples, "synthetic_samples")
        return SyntheticPipeline(sampler, options.size, options.device, options.dtype, options.in_chans)
    if options.in_chans != 3:
        raise SettingsError(
            f"in_chans {options.in_chans}: images are read with three channels; only pipeline synthetic has others"
        )
    source = _source(data_path, options)
    try:
        return _backend(source, options)(source, _sampler(options, len(source), str(data_path)), options)
    except BaseException:
        source.close()
        raise


def choose_pipeline(source: Source) -> tuple[str, str]:
    """The fastest installed pipeline for these data, as docs/data.md measures them, and why it is that one."""
    if isinstance(source, BetonSource) and (source.checks["mode"] == RAW).any():
        try:
            require_ffcv("taking the raw pixels in this .beton as they are")
        except SettingsError as error:
            return "torch", str(error)
        return "ffcv", "it takes the raw pixels in this .beton as they are"
    return "torch", "it decodes JPEGs faster than the others on a CPU"


def _source(data_path: str | Path | None, options: LoaderOptions) -> Source:
    if data_path is None:
        raise SettingsError("no data_path: name a folder of images, of class folders or of shards, or a file list")
    if options.pipeline == "ffcv":
        return BetonSource(find_beton(data_path, options.view.split))
    source = detect_source(data_path, options.view.split)
    if isinstance(source, FileSource):
        source.allow_pixels(options.max_pixels * MEGAPIXEL)
    return source


def _backend(source: Source, options: LoaderOptions) -> type[Backend]:
    pipeline = options.pipeline
    if pipeline == "auto":
        pipeline, why = ("torch", "it leaves work to the device") if options.on_device else choose_pipeline(source)
        logger.info("pipeline %s: %s", pipeline, why)
    if pipeline == "torch":
        return DeviceDecodePipeline if options.decode_on == "device" else TorchPipeline
    return FfcvPipeline if pipeline == "ffcv" else DaliPipeline


def _sampler(options: LoaderOptions, num_samples: int, where: str) -> Sampler:
    view = options.view
    sampler = Sampler(
        num_samples,
        options.batch_size,
        options.seed,
        options.rank,
        options.world_size,
        repeats=view.repeats,
        in_order=view.in_order,
    )
    if not len(sampler):
        raise DataError(
            f"a global batch of {options.batch_size} is larger than the {num_samples} images of {where}:"
            f" an epoch would have no step. Take a batch_size of {num_samples} or less, or more data."
        )
    return sampler
