"""Images decoded once and held in the device's memory: what `learning.py --form evidence_gpu` learns from.

`MemoryPipeline` gives the batches of the product's pipelines for the same settings, epoch and step, pixel for pixel to
rounding: the same order, boxes and flips, the same bicubic resize. All images have one size, so there are few crops of
a line, and the matrix that resizes each of them, flipped or not, is made beforehand. A batch is then two batched
products, with the matrices of its crops: across, then down, and bytes after each, as Pillow does it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spark_fast.errors import DataError, ImageError, SettingsError
from spark_fast.evaluation.data import Labelled, central
from spark_fast.evaluation.eval_settings import Knn
from spark_fast.evaluation.online_knn import OnlineKnn
from spark_fast.pipelines import Batch, LoaderOptions, View
from spark_fast.pipelines.backends.backend import Backend
from spark_fast.pipelines.backends.image_loader import ImageLoader
from spark_fast.pipelines.build import make_sampler, open_source
from spark_fast.pipelines.sampler import Sampler, Share, uniform
from spark_fast.pipelines.sources.source import Source
from spark_fast.pipelines.transforms.crops import ATTEMPTS, DRAWS, Augmentation, random_box
from spark_fast.pipelines.transforms.device_augment import bicubic_weights
from spark_fast.run.config import Tree

Numbers = NDArray[np.int64]


class MemoryPipeline(Backend):
    """Batches out of the device's memory.

    Args:
        pixels: (N, h, w, 3), of the images of `source`.
        passes: an epoch is so many of the product's. What a trainer does at an epoch's end, a checkpoint above all,
            waits for the device hundreds of times, and for its turn where other processes keep it busy.
    """

    def __init__(
        self, source: Source, sampler: Sampler, options: LoaderOptions, pixels: NDArray[np.uint8], passes: int = 1
    ) -> None:
        if not options.photographs or options.view.vflip or options.view.rot90:
            raise SettingsError("images in memory are photographs of 8 bits, neither turned nor upside down")
        super().__init__(source, sampler, options)
        self._passes = passes
        self._rows, self._columns = pixels.shape[1:3]
        # (N, w, h, 3): the first product is across
        self._held = torch.from_numpy(pixels).to(self.device).transpose(1, 2).contiguous()
        self._numbers = None if self.labels is None else torch.from_numpy(self.labels).to(self.device, torch.int64)
        height, width = self._size
        across = resize_matrices(self._columns, width)
        self._across = torch.stack([across, across.flip(2)]).flatten(0, 2).to(self.device)  # (2 * w * w, W, w)
        self._down = resize_matrices(self._rows, height).flatten(0, 1).to(self.device)  # (h * h, H, h)

    def __len__(self) -> int:
        return self._passes * len(self._sampler)

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """Batches start_step ... len(self) - 1 of this epoch."""
        if self._closed.is_set():
            raise RuntimeError("this pipeline was closed")
        done, start = divmod(start_step, len(self._sampler))
        epochs = range(epoch * self._passes + done, (epoch + 1) * self._passes)
        steps = (self._sampler.epoch(each, 0 if each > epochs[0] else start) for each in epochs)
        return self._told((batch for some in steps for batch in self._batches(some)), start_step)

    def close(self) -> None:
        """Close the source."""
        self._closed.set()
        self._source.close()

    def _batches(self, steps: Iterator[Share]) -> Generator[Batch, None, None]:
        shares = list(steps)
        if not shares:
            return
        ids, draw_ids = (np.concatenate(parts) for parts in zip(*shares, strict=True))
        crops = torch.from_numpy(np.stack([ids, *self._crops(ids, draw_ids)])).to(self.device)  # one copy a pass
        for share, where in zip(shares, crops.split([len(share.ids) for share in shares], dim=1), strict=True):
            self.bad_images.read += len(share.ids)
            labels = None if self._numbers is None else self._numbers.index_select(0, where[0])
            yield Batch(self._cut(*where), labels, torch.from_numpy(share.ids.copy()))

    def _crops(self, ids: Numbers, draw_ids: Numbers) -> tuple[Numbers, Numbers]:
        """For each sample the number of its matrix in `_across` and in `_down`, (n,) each."""
        how, size = self._augmentation, (self._rows, self._columns)
        if how.random:
            draws = uniform(self._sampler.seed, draw_ids, ids, DRAWS)
            boxes, flipped = random_boxes(draws, *size, how), how.flip & (draws[:, DRAWS - 1] < 0.5)
        else:
            boxes, flipped = np.tile(np.array(how.box((), *size)), (len(ids), 1)), np.zeros(len(ids), bool)
        top, left, height, width = boxes.T
        return (flipped * self._columns + width - 1) * self._columns + left, (height - 1) * self._rows + top

    def _cut(self, images: Tensor, across: Tensor, down: Tensor) -> Tensor:
        """Normalised crops (B, 3, H, W), channels_last, by the numbers of images and matrices, (B,) each."""
        height, width = self._size
        lines = self._held.index_select(0, images).float().flatten(2)  # (B, w, h * 3)
        wide = _bytes(torch.bmm(self._across.index_select(0, across), lines))  # (B, W, h * 3)
        wide = wide.view(-1, width, self._rows, 3).transpose(1, 2).flatten(2)  # -> (B, h, W * 3)
        pixels = _bytes(torch.bmm(self._down.index_select(0, down), wide))  # (B, H, W * 3)
        return self._normalise(pixels.view(-1, height, width, 3))


def random_boxes(draws: NDArray[np.float64], height: int, width: int, how: Augmentation) -> Numbers:
    """`crops.random_box` of each row of `draws`, (n, DRAWS): (n, 4), top, left, height and width."""
    low, high = math.log(how.ratio[0]), math.log(how.ratio[1])
    areas = height * width * (how.scale[0] + (how.scale[1] - how.scale[0]) * draws[:, 0 : 2 * ATTEMPTS : 2])
    aspects = np.exp(low + (high - low) * draws[:, 1 : 2 * ATTEMPTS : 2])
    w, h = (np.rint(np.sqrt(side)).astype(np.int64) for side in (areas * aspects, areas / aspects))  # (n, ATTEMPTS)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = np.arange(len(draws)), fits.argmax(1)
    h, w = h[first], w[first]
    top = (draws[:, 2 * ATTEMPTS] * (height - h + 1)).astype(np.int64)
    left = (draws[:, 2 * ATTEMPTS + 1] * (width - w + 1)).astype(np.int64)
    boxes = np.stack([top, left, h, w], axis=1)
    if len(none := draws[~fits.any(1)]):  # these all get the same box
        boxes[~fits.any(1)] = random_box(none[0].tolist(), height, width, how.scale, how.ratio)
    return boxes


def resize_matrices(side: int, out: int) -> Tensor:
    """(side, side, out, side): [n - 1, s] resizes n pixels of a line of `side`, from s on, to `out` pixels."""
    first = bicubic_weights(torch.arange(1, side + 1), side, out)  # (side, out, side), of crops from 0 on
    return torch.stack([first.roll(start, 2) for start in range(side)], dim=1)


def _bytes(values: Tensor) -> Tensor:
    """Rounded to 0 ... 255, in place."""
    return values.round_().clamp_(0, 255)


@dataclass(frozen=True)
class Memory:
    """Opens images in the memory of a device; what was decoded for it is kept in a folder, for other processes too."""

    folder: Path
    device: torch.device

    def open(self, settings: Tree, path: str, view: View, batch_size: int, passes: int = 1) -> MemoryPipeline:
        """What the product's `open_pipeline` opens, for one rank; `passes`: see `MemoryPipeline`.

        Raises:
            DataError: the images cannot be used, differ in size, or do not fill a batch.
        """
        data = settings.data
        options = LoaderOptions(
            batch_size, input_size=settings.size, in_chans=settings.in_chans, seed=settings.run.seed,
            device=self.device, workers=data.workers, max_pixels=data.max_pixels, view=view,
        )  # fmt: skip
        source = open_source(path, options)
        try:
            pixels = self._decoded(source, f"{Path(path).resolve()} {view.split}", options.workers)
            return MemoryPipeline(source, make_sampler(options, len(source), path, source), options, pixels, passes)
        except BaseException:
            source.close()
            raise

    def hold(self, data: Labelled, settings: Any, path: str, view: View) -> None:
        """Give labelled images out of memory from now on."""
        data.pipeline.close()
        data.pipeline = self.open(settings, path, view, settings.batch_size)

    def _decoded(self, source: Source, name: str, threads: int) -> NDArray[np.uint8]:
        """All images, (N, h, w, 3), decoded unless some process has done so."""
        path = self.folder / f"{hashlib.sha256(f'{name} {source.fingerprint()}'.encode()).hexdigest()[:32]}.npy"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            written = path.with_suffix(f".{os.getpid()}")  # others may be writing the same
            with written.open("wb") as file:
                np.save(file, decode(source, threads))
            written.replace(path)
        return np.load(path)


def decode(source: Source, threads: int) -> NDArray[np.uint8]:
    """All images of a source, (N, h, w, 3).

    Raises:
        DataError: one cannot be read, or they differ in size.
    """
    loader = ImageLoader(source, Augmentation())

    def pixels(i: int) -> NDArray[np.uint8]:
        try:
            return loader.read(i).pixels
        except (ImageError, OSError) as error:
            raise DataError(f"image {i} ({source.name(i)}) cannot be held in memory: {error}") from error

    with ThreadPoolExecutor(threads) as pool:
        images = list(pool.map(pixels, range(len(source))))
    if len(sizes := {image.shape[:2] for image in images}) > 1:
        raise DataError(f"images in memory have one size, these {len(sizes)}: {sorted(sizes)[:3]} ...")
    return np.stack(images)


class MemoryKnn(OnlineKnn):
    """k-NN while an encoder is pre-trained, its images out of memory."""

    def __init__(self, memory: Memory, *args: Any) -> None:
        self._memory = memory
        super().__init__(*args)

    def _open(self, asked: Knn, closing: ExitStack) -> None:
        super()._open(asked, closing)
        for data, split in ((self._train, "train"), (self._val, "val")):
            if data is not None:
                self._memory.hold(data, asked, asked.data.data_path, central(asked, split))
                closing.callback(data.pipeline.close)
