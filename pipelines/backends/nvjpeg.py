"""JPEGs decoded on the device: nvJPEG, by torchvision's batched decoder, then `device_augment`.

The bytes of a batch go to the device; decode, crop, resize, flip, normalise and layout happen there, on a stream beside
the training step's. nvJPEG has no region of interest here, so images are decoded whole. On a CPU the same class
decodes with torchvision's libjpeg: slower than `torch_pipeline`, but all the rest can be tested.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from spark_fast.pipelines.backends.batch_decoder import BatchDecoder, DecoderError, Encoded, EncodedPipeline
from spark_fast.pipelines.transforms.device_augment import DeviceAugment


class DeviceDecoder:
    """Decodes and augments a batch; for one thread at a time, as it has one stream."""

    name = "torchvision's decoder"

    def __init__(self, augment: DeviceAugment, device: torch.device) -> None:
        self._augment, self._device = augment, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def decode(self, images: Sequence[Encoded]) -> Tensor:
        """(n, 3, H, W), normalised, channels_last. Raises DecoderError when an image cannot be decoded."""
        if self._stream is None:
            return self._decode(images)
        with torch.cuda.stream(self._stream):  # not behind the kernels of the training step
            batch = self._decode(images)
        self._stream.synchronize()  # this thread alone waits
        return batch

    def close(self) -> None:
        """Nothing is held."""

    def _decode(self, images: Sequence[Encoded]) -> Tensor:
        decoded = iter(self._decode_jpegs([torch.from_numpy(i.data.copy()) for i in images if i.data.ndim == 1]))
        cells = torch.empty(len(images), *self._augment.cell, 3, dtype=torch.uint8, device=self._device)
        sizes = []
        for image, cell in zip(images, cells, strict=True):
            is_file = image.data.ndim == 1
            pixels = next(decoded) if is_file else torch.from_numpy(image.data).to(self._device).permute(2, 0, 1)
            top, left, height, width = image.box
            crop = self._fitting(pixels[:, top : top + height, left : left + width])  # (3, h, w)
            cell[: crop.shape[1], : crop.shape[2]] = crop.permute(1, 2, 0)
            sizes.append((*crop.shape[1:], image.flip))
        return self._augment(cells, torch.from_numpy(np.array(sizes, np.int64)).to(self._device))

    def _decode_jpegs(self, files: list[Tensor]) -> list[Tensor]:
        """(3, h, w) uint8 each."""
        if not files:
            return []
        try:
            return decode_jpeg(files, ImageReadMode.RGB, self._device)
        except RuntimeError as error:
            raise DecoderError(str(error).splitlines()[0]) from error

    def _fitting(self, crop: Tensor) -> Tensor:
        """The crop, (3, h, w), resized to the input's size if a cell cannot hold it."""
        if self._augment.holds(*crop.shape[1:]):
            return crop
        resized = interpolate(crop[None].float(), self._augment.input_size, mode="bicubic", antialias=True)
        return resized[0].clamp(0, 255).round().byte()


class DeviceDecodePipeline(EncodedPipeline):
    """Batches of `source`, as the options say."""

    def _make_decoder(self) -> BatchDecoder:
        return DeviceDecoder(DeviceAugment(self._size, self.device, self._dtype), self.device)

    def _finished(self, decoded: Tensor) -> Tensor:
        return decoded
