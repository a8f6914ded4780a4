"""Batches decoded by FFCV from a `.beton`, in the sampler's order, with the augmentation's crops.

FFCV's thread decodes a batch at a time with `workers` compiled threads (`ffcv_loader`, `ffcv_kernel`); the
device normalises. A record whose bytes are not those that were written, or that does not decode, is loaded here as in
the default pipeline (`image_loader`): the next readable image stands in.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spark_fast.errors import DataError
from spark_fast.pipelines.backends.backend import Backend
from spark_fast.pipelines.backends.image_loader import ImageLoader
from spark_fast.pipelines.base import Batch
from spark_fast.pipelines.ffcv_install import require_ffcv
from spark_fast.pipelines.options import LoaderOptions
from spark_fast.pipelines.sampler import Sampler, Share, uniform
from spark_fast.pipelines.sources.bad_images import Loaded
from spark_fast.pipelines.sources.beton import BetonSource
from spark_fast.pipelines.sources.source import Source, naming_image
from spark_fast.pipelines.transforms.crops import DRAWS


class FfcvPipeline(Backend):
    """Batches of a .beton, as the options say. SettingsError without FFCV."""

    def __init__(self, source: Source, sampler: Sampler, options: LoaderOptions) -> None:
        assert isinstance(source, BetonSource)
        super().__init__(source, sampler, options)
        require_ffcv("--pipeline ffcv")
        from spark_fast.pipelines.backends.ffcv_kernel import PLAN
        from spark_fast.pipelines.backends.ffcv_loader import PlannedEpoch, PlannedLoader

        self._beton = source
        self._images = ImageLoader(source, self._augmentation, max_pixels=self._max_pixels)
        self._bytes = source.size()
        self._heights, self._widths = (source.checks[side].astype(int) for side in ("height", "width"))
        self._plan_type = PLAN
        self._loader = PlannedLoader(
            source, self._share, self._size, options.ffcv_resize == "bicubic", self._workers, self._prefetch
        )
        self._open: set[PlannedEpoch] = set()

    def close(self) -> None:
        """Stop FFCV's threads and close the file."""
        self._closed.set()
        for epoch in list(self._open):
            epoch.close()
        self._source.close()

    def _batches(self, steps: Iterator[Share]) -> Generator[Batch, None, None]:
        shares = list(steps)
        if not shares:
            return
        ids, draw_ids = (np.concatenate(column) for column in zip(*shares, strict=True))
        plan = np.zeros(len(ids), self._plan_type)
        plan["sample"], plan["draw"], plan["crc"] = ids, draw_ids, self._beton.checks["crc"][ids]
        decoded = self._loader.planned(plan, self._prepare, self._finish)
        self._open.add(decoded)
        try:
            for rows, pixels, loaded in decoded:
                ids = rows["sample"].astype(np.int64)
                self._bad_images.count(ids.tolist(), loaded)
                images = self._normalised(pixels)
                yield Batch(images, self._labels(ids), torch.from_numpy(ids))
        finally:
            decoded.close()
            self._open.discard(decoded)

    def _prepare(self, plan: NDArray[np.void]) -> list[list[float]]:
        """In FFCV's thread: boxes and flips of a batch; returns the samples' random numbers."""
        if self._beton.size() != self._bytes:  # a memory map of it would end the process
            raise DataError(f"{self._beton.path} has changed its size while in use: copy it again")
        ids, augmentation = plan["sample"], self._augmentation
        draws = uniform(self._sampler.seed, plan["draw"], ids, DRAWS).tolist()
        heights, widths = self._heights[ids].tolist(), self._widths[ids].tolist()
        boxes = [augmentation.box(row, h, w) for row, h, w in zip(draws, heights, widths, strict=True)]
        for side, values in zip(("top", "left", "height", "width"), zip(*boxes, strict=True), strict=True):
            plan[side] = values
        plan["flip"] = [augmentation.flips(row) for row in draws]
        return draws

    def _finish(self, plan: NDArray[np.void], draws: list[list[float]], pixels: Tensor) -> list[Loaded]:
        """In FFCV's thread: load the images in whose place the kernel left a fault."""
        loaded = [Loaded(False, None)] * len(plan)
        for place in np.flatnonzero(plan["fault"]).tolist():
            sample = int(plan["sample"][place])
            self._stop_unless_wanted()
            with naming_image(self._source, sample):
                loaded[place] = self._images.load(sample, draws[place], pixels[place])
        return loaded
