"""The part of `loader_throughput.py` that is no photographs: 1 and 12 channels of 16 bits, from TIFF and from shards.

A plain torch DataLoader reads the same files by tifffile and augments by torchvision's v2 transforms; beside the shards
it reads the files that they were made of, so that both are measured in the same minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch

from spark_fast.pipelines import LoaderOptions, View, build_pipeline

CHANNELS = {"1 x 16 bit": 1, "12 x 16 bit": 12}
SIDE = 300  # pixels of a file's image
OF_SHARDS = "_shards"  # ending of a folder of shards, beside that of the files that they were made of


def write_files(folder: Path, channels: int, images: int) -> None:
    """A class folder of TIFF files, compressed as scanners' and satellites' are: waves and noise, 12 bits."""
    (folder / "class").mkdir(parents=True, exist_ok=True)
    y, x, c = np.ogrid[:SIDE, :SIDE, :channels]
    for i in range(images):
        noise = np.random.default_rng(i).normal(0, 0.01, (SIDE, SIDE, channels))
        pixels = (0.5 + 0.4 * np.sin(x / (9 + c)) * np.cos(y / (7 + i % 9)) + noise).clip(0, 1) * 4095
        layout: dict[str, Any] = {} if channels == 1 else {"planarconfig": "contig"}
        tifffile.imwrite(
            folder / "class" / f"{i:05d}.tif",
            np.squeeze(pixels.astype(np.uint16)),
            photometric="minisblack",
            compression="zlib",
            predictor=True,
            **layout,
        )


def ours(channels: int, size: int, scale: tuple[float, float]) -> Callable[[Path, int, int], Iterator[None]]:
    """This project's default pipeline; each `next` is one epoch."""

    def epochs(store: Path, batch: int, cores: int) -> Iterator[None]:
        view = View(scale=scale)
        options = LoaderOptions(batch, "torch", input_size=size, in_chans=channels, workers=cores, view=view)
        loader, number = build_pipeline(store, options), 0
        while True:
            for _ in loader.epoch(number):
                pass
            number += 1
            yield

    return epochs


class Tiffs(torch.utils.data.Dataset):
    """TIFF files as a user without a library for them writes it."""

    def __init__(self, store: Path, channels: int, size: int, scale: tuple[float, float]) -> None:
        from torchvision.transforms import v2

        self._paths = sorted(store.with_name(store.name.removesuffix(OF_SHARDS)).rglob("*.tif"))
        self._transform = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.Normalize([2048.0] * channels, [1000.0] * channels),
            ]
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        pixels = np.atleast_3d(tifffile.imread(self._paths[i], maxworkers=1)).astype(np.float32)
        return self._transform(torch.from_numpy(pixels).permute(2, 0, 1))  # (H, W, C) -> (C, H, W)


def plain(channels: int, size: int, scale: tuple[float, float]) -> Callable[[Path, int, int], Iterator[None]]:
    """torch's DataLoader over `Tiffs`, in worker processes."""

    def epochs(store: Path, batch: int, cores: int) -> Iterator[None]:
        images = Tiffs(store, channels, size, scale)
        loader = torch.utils.data.DataLoader(
            images, batch, shuffle=True, drop_last=True, num_workers=cores, persistent_workers=True
        )
        while True:
            for _ in loader:
                pass
            yield

    return epochs
