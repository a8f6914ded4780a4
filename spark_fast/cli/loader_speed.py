"""Where an image's time goes before it reaches the network: reading, decoding, resizing; and how many come a second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from spark_fast.cli.storage_speed import reading_order
from spark_fast.commands import command
from spark_fast.errors import DataError, ImageError
from spark_fast.pipelines.backends.image_loader import judged_when_stored
from spark_fast.pipelines.build import build_pipeline, measure_statistics, open_source
from spark_fast.pipelines.options import LoaderOptions
from spark_fast.pipelines.sources.remote.url import is_remote
from spark_fast.pipelines.sources.source import Source, read_patiently
from spark_fast.pipelines.transforms.bands.decode_bands import decode_bands
from spark_fast.pipelines.transforms.decode import decode_image

SAMPLE = 256  # images that are read and decoded, at random; the pipelines load as many
SECONDS = 3.0  # after which each of these ends early
STORED = 256 * 341  # pixels of a photograph of 4:3 as the converter stores it


@dataclass(frozen=True)
class LoaderSpeed:
    """Seconds of one core for an image of these data, and images a second of the whole loader."""

    reading: float  # from the page cache where the system has read the file before
    decoding: float
    resizing: float  # crop, resize, flip and normalise; and what passing a batch on takes
    rate: float  # images a second with `workers` threads
    workers: int
    bytes: float  # of an encoded image, mean
    pixels: float  # of a decoded one, mean
    remote: bool = False  # from a server, by way of the cache

    @property
    def of_one_core(self) -> float:
        """Images a second with one thread."""
        return 1 / (self.reading + self.decoding + self.resizing)

    def limit(self, disk: float | None = None) -> tuple[str, str]:
        """What limits the loader, and what to do.

        Args:
            disk: bytes a second that the storage gives when nothing is in the page cache, or the server when nothing
                is in the cache; None: not known.
        """
        if disk is not None and disk / self.bytes < self.rate:
            place = "server" if self.remote else "storage"
            remedy = "give --cache_size room for all shards" if self.remote else "put the images on a faster disk"
            return f"the {place}: {disk / self.bytes:.0f} images/s", (
                f"{remedy}, or store them smaller: {command('convert')} --short_side"
            )
        if self.reading > max(self.decoding, self.resizing):
            if self.remote:
                return "reading", "put the cache on a local disk: --cache_dir"
            return "reading", f"put the images on a local disk, in shards: {command('convert')}"
        if self.decoding > self.resizing and self.pixels > 1.5 * STORED:
            fewer = self.pixels / STORED
            return "decoding", f"{command('convert')} --short_side 256 leaves {fewer:.1f} times fewer pixels to decode"
        what = "decoding" if self.decoding > self.resizing else "resizing"
        on_gpu = "decode" if what == "decoding" else "augment"
        return what, f"use more cores and --workers, or on a GPU --{on_gpu} device"


def loader_speed(data_path: str | Path, options: LoaderOptions) -> LoaderSpeed:
    """Measure the `torch` pipeline on a sample of the images at `data_path`, for some seconds.

    Of a server they are those that are read first, whose shards should be in the cache.

    Raises DataError when none of the sample can be read, and what `build_pipeline` raises.
    """
    source = open_source(data_path, options)
    try:
        count = min(len(source), SAMPLE)
        sample = reading_order(source, options)[:count].tolist()
        found, reasons = [], []
        for i in _for_a_while(sample):
            try:
                found.append(_read_and_decode(source, i, options))
            except (ImageError, OSError) as error:  # noqa: PERF203
                reasons.append(f"{source.name(i)}: {error}")
        if not found:
            raise DataError(f"none of {len(reasons)} images at {data_path} can be read; the first: {reasons[0]}")
    finally:
        source.close()
    reading, decoding, size, pixels = (sum(column) / len(found) for column in zip(*found, strict=True))
    options = replace(options, pipeline="torch", batch_size=min(options.batch_size, count))
    options = replace(options, statistics=measure_statistics(data_path, options))  # once, not for each pipeline
    alone = _rate(data_path, replace(options, workers=1), count)
    rate = alone if options.workers == 1 else _rate(data_path, options, count)
    resizing = max(1 / alone - reading - decoding, 0.0)
    return LoaderSpeed(reading, decoding, resizing, rate, options.workers, size, pixels, is_remote(data_path))


def _for_a_while(sample: list[int]) -> Iterator[int]:
    """The sample, cut off after SECONDS."""
    end = time.monotonic() + SECONDS
    for i in sample:
        yield i
        if time.monotonic() > end:
            return


def _read_and_decode(source: Source, i: int, options: LoaderOptions) -> tuple[float, float, int, int]:
    """Seconds to read and to decode image i, its bytes and its pixels."""
    begun = time.perf_counter()
    data = read_patiently(source, i)
    read = time.perf_counter()
    judged = judged_when_stored(source)
    if options.photographs:
        pixels = decode_image(data, judged=judged).pixels
    else:
        pixels = decode_bands(data, options.expected, judged=judged).pixels
    return read - begun, time.perf_counter() - read, len(data), pixels.shape[0] * pixels.shape[1]


def _rate(data_path: str | Path, options: LoaderOptions, count: int) -> float:
    """Images a second of the pipeline from its second batch on."""
    pipeline = build_pipeline(data_path, options)
    try:
        images, begun = 0, 0.0
        for epoch in range(100):
            for batch in pipeline.epoch(epoch):
                now = time.perf_counter()
                if not begun:  # threads and buffers are made with the first one
                    begun = now
                    continue
                images += len(batch.images)
                if now - begun > SECONDS or images >= 4 * count:
                    return images / (now - begun)
        return images / (time.perf_counter() - begun)
    finally:
        pipeline.close()
