"""Random images, rendered and normalised once: the upper bound of the speed of training, without input."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from spark_fast.pipelines.base import BadImageCounts, Batch
from spark_fast.pipelines.sampler import Sampler
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from spark_fast.pipelines.transforms.resize import MEAN, STD, Normalise

IMAGES = 16  # different ones; sample i shows image i % IMAGES


class SyntheticPipeline:
    """Random smooth fields of any number of channels on the device, in batches as any other pipeline's.

    Three channels are normalised as photographs are, others by about the mean and the deviation that they have.
    """

    def __init__(
        self,
        sampler: Sampler,
        input_size: tuple[int, int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        in_chans: int = 3,
    ) -> None:
        self.num_samples, self.num_classes = sampler.num_samples, IMAGES
        self.listing = "generated"
        self.labels: NDArray[np.int32] | None = np.arange(sampler.num_samples, dtype=np.int32) % IMAGES
        self.classes: list[str] = []
        self.empty_classes: set[str] = set()
        self.bad_images = BadImageCounts()
        self.statistics: Statistics | None = None
        self.device = torch.device(device)
        self._sampler, self._closed = sampler, False
        coarse = torch.rand(IMAGES, in_chans, 8, 8, generator=torch.Generator().manual_seed(sampler.seed))
        images = interpolate(coarse, size=input_size, mode="bicubic").clamp(0, 1)
        pixels = (255 * images).byte().permute(0, 2, 3, 1).contiguous()  # -> (IMAGES, H, W, C)
        mean, std = (MEAN, STD) if in_chans == 3 else ((0.5,) * in_chans, (0.25,) * in_chans)
        # (IMAGES, H, W, C), so that picking images keeps them channels_last
        normalise = Normalise(input_size[1], self.device, dtype, mean, std)
        self._images = normalise(pixels.to(self.device)).permute(0, 2, 3, 1)

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """Batches start_step ... len(self) - 1 of this epoch; the labels are the numbers of the images.

        Raises:
            RuntimeError: the pipeline was closed; the iterator raises it, too.
            ValueError: a start_step outside the epoch.
        """
        self._check_open()
        return (self._batch(share.ids) for share in self._sampler.epoch(epoch, start_step))

    def close(self) -> None:
        """Nothing is released, but no batch can be read afterwards."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this pipeline was closed")

    def _batch(self, sample_ids: NDArray[np.int64]) -> Batch:
        self._check_open()
        ids = torch.from_numpy(sample_ids.copy())
        shown = (ids % IMAGES).to(self.device, non_blocking=True)
        self.bad_images.read += len(ids)
        return Batch(self._images[shown].permute(0, 3, 1, 2), shown, ids)
