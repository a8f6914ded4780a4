"""From settings to a pipeline, and every complaint about the settings before the first image is read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from spark_fast.errors import DataError
from spark_fast.pipelines.backends.dali_pipeline import DaliPipeline
from spark_fast.pipelines.backends.ffcv import FfcvPipeline
from spark_fast.pipelines.backends.nvjpeg import DeviceDecodePipeline
from spark_fast.pipelines.backends.synthetic import SyntheticPipeline
from spark_fast.pipelines.backends.torch_threads import TorchPipeline
from spark_fast.pipelines.base import Pipeline
from spark_fast.pipelines.ffcv_install import require_ffcv
from spark_fast.pipelines.sampler import Sampler
from spark_fast.pipelines.sources.beton import RAW, BetonSource, find_beton
from spark_fast.pipelines.sources.detect import open_source
from spark_fast.pipelines.sources.folder import Source
from spark_fast.pipelines.transforms.crops import Augmentation

PIPELINES = ("auto", "torch", "dali", "ffcv", "synthetic")
PLACES = ("host", "device")

logger = logging.getLogger("spark_fast.pipelines")


def build_pipeline(
    data_path: str | Path | None,
    *,
    pipeline: str = "auto",
    batch_size: int,
    input_size: int | tuple[int, int] = 224,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    workers: int = 2,
    prefetch: int = 2,
    scale: tuple[float, float] = (0.67, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    augment: bool = True,
    augment_on: str = "host",
    decode_on: str = "host",
    max_bad_fraction: float = 0.01,
    synthetic_samples: int = 1_281_167,
    ffcv_resize: str = "bicubic",
    split: str = "train",
    in_order: bool = False,
    repeats: int = 1,
    centre: float = 1.0,
) -> Pipeline:
    """A pipeline over the images at `data_path`, anything that `open_source` knows, for one rank.

    `batch_size` is the *global* batch, over all ranks; `input_size` a side or (height, width); `workers` the decoder
    threads of this rank, `prefetch` the batches they may be ahead. With `augment=False` nothing is drawn: the crop
    is central, of `centre` times the largest one's side. For `split` see `open_source`, for `in_order` and `repeats`
    `Sampler`. "synthetic" ignores the path and has `synthetic_samples` samples (ImageNet's number). "auto" is the
    fastest installed one for these data, and is told to the log. "ffcv" reads a .beton and resizes as `ffcv_resize`
    says, bicubic as all others, or area, FFCV's own.
    With `augment_on="device"` "torch" leaves resize, flip and the rest to the device (see `device_augment`), with
    `decode_on="device"` decoding, too (see `device_decode`); the others know "host" alone.

    Raises DataError when the data cannot be used, or not with these settings, or the pipeline is not installed.
    """
    _check_settings(pipeline, batch_size, world_size, repeats, centre)
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    scheduled = partial(_schedule, batch_size, seed, rank, world_size, repeats, in_order)
    if pipeline == "synthetic":
        return SyntheticPipeline(scheduled(synthetic_samples, "synthetic_samples"), size, device, dtype)
    source = _source(data_path, split, pipeline)
    try:
        return _decoding(pipeline, source, ffcv_resize, augment_on, decode_on)(
            source,
            scheduled(len(source), str(data_path)),
            Augmentation(size, scale, ratio, flip, random=augment, centre=centre),
            device=device,
            dtype=dtype,
            workers=workers,
            prefetch=prefetch,
            max_bad_fraction=max_bad_fraction,
        )
    except BaseException:
        source.close()
        raise


def _source(data_path: str | Path | None, split: str, pipeline: str) -> Source:
    if data_path is None:
        raise DataError("no data_path: name a folder of images, of class folders or of shards, or a file list")
    return BetonSource(find_beton(data_path, split)) if pipeline == "ffcv" else open_source(data_path, split)


def choose_pipeline(source: Source) -> tuple[str, str]:
    """The fastest installed pipeline for these data, as docs/data.md measures them, and why it is that one."""
    if isinstance(source, BetonSource) and (source.checks["mode"] == RAW).any():
        try:
            require_ffcv("taking the raw pixels in this .beton as they are")
        except DataError as error:
            return "torch", str(error)
        return "ffcv", "it takes the raw pixels in this .beton as they are"
    return "torch", "it decodes JPEGs faster than the others on a CPU"


def _decoding(
    pipeline: str, source: Source, ffcv_resize: str, augment_on: str, decode_on: str
) -> Callable[..., Pipeline]:
    for where in (augment_on, decode_on):
        if where not in PLACES:
            raise DataError(f"augmenting or decoding on {where!r} is unknown; there are: {', '.join(PLACES)}")
    on_device = "device" in (augment_on, decode_on)
    if pipeline == "auto":
        pipeline, why = ("torch", "it leaves work to the device") if on_device else choose_pipeline(source)
        logger.info("pipeline %s: %s", pipeline, why)
    if pipeline == "torch":
        return DeviceDecodePipeline if decode_on == "device" else partial(TorchPipeline, augment_on=augment_on)
    if on_device:
        raise DataError(f"pipeline {pipeline} cannot leave its work to the device as asked: take torch, or the host")
    return partial(FfcvPipeline, resize=ffcv_resize) if pipeline == "ffcv" else DaliPipeline


def _check_settings(pipeline: str, batch_size: int, world_size: int, repeats: int, centre: float) -> None:
    if pipeline not in PIPELINES:
        raise DataError(f"pipeline {pipeline!r} is unknown; there are: {', '.join(PIPELINES)}")
    _check_shared(batch_size, world_size)
    if repeats < 1 or not 0 < centre <= 1:
        raise DataError(f"repeats must be 1 or more and centre above 0 and at most 1, got {repeats} and {centre}")


def _schedule(
    batch_size: int, seed: int, rank: int, world_size: int, repeats: int, in_order: bool, num_samples: int, where: str
) -> Sampler:
    schedule = Sampler(num_samples, batch_size, seed, rank, world_size, repeats, in_order)
    if not len(schedule):
        raise DataError(
            f"a global batch of {batch_size} is larger than the {num_samples} images of {where}:"
            f" an epoch would have no step. Take a batch_size of {num_samples} or less, or more data."
        )
    return schedule


def _check_shared(batch_size: int, world_size: int) -> None:
    if batch_size < 1 or world_size < 1 or batch_size % world_size:
        lower = max(batch_size, 0) // max(world_size, 1) * world_size
        raise DataError(
            f"a global batch of {batch_size} cannot be shared equally by {world_size} processes:"
            f" take a multiple of {world_size}, such as {lower or world_size}"
        )
