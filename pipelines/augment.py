"""From decoded pixels to network input: crop, antialiased bicubic resize, flip; then normalise.

The first three run per image on the CPU, in uint8, straight into the batch's buffer. The resize is
torch's uint8 kernel, an offspring of Pillow's: it differs from the PIL resize of the published code by
0.02/255 on average, and costs half. Normalising is left to the device and the whole batch: bytes are a
quarter of what fp32 would put through memory and over the bus.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from pipelines.crops import Box

# ImageNet's, of pixels in [0, 1] (timm.data.constants)
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def cut(image: NDArray[np.uint8], box: Box, flip: bool, out: Tensor) -> None:
    """Crop `image` (h, w, 3) to `box`, resize it to the size of `out` (H, W, 3) uint8, flip, store there."""
    height, width, _ = out.shape
    resized = resize(crop(image, box), (height, width))
    out.copy_(resized.flip(1) if flip else resized)


def crop(image: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    """What of an image, (h, w, 3), lies in a box: a view."""
    return image[box.top : box.top + box.height, box.left : box.left + box.width]


def resize(image: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """Antialiased bicubic: (h, w, 3) -> (*size, 3) uint8."""
    # torch's [None], not NumPy's: with a stride of 0 torch would take the batch of one for planes and be twice as slow
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # (h, w, 3) -> (1, 3, h, w), channels_last
    return interpolate(pixels, size=size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)  # -> (H, W, 3)


class Normalise:
    """uint8 (B, H, W, 3) -> dtype (B, 3, H, W), channels_last, (pixel / 255 - mean) / std.

    The three channels' factors are laid out along a whole row of pixels: broadcasting over an innermost
    dimension of 3 is 4 to 12 times slower on a CPU.
    """

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        mean, std = torch.tensor(MEAN), torch.tensor(STD)
        self._factor = (1 / (255 * std)).repeat(width).to(device)  # (W * 3,)
        self._offset = (-mean / std).repeat(width).to(device)
        self._dtype = dtype

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise a batch on the device where its pixels are, in fp32, then round to dtype."""
        rows = self._rows(pixels).to(self._dtype)
        return rows.view(pixels.shape).permute(0, 3, 1, 2)  # -> (B, 3, H, W), channels_last

    def into(self, out: Tensor, pixels: Tensor) -> None:
        """The same for one image, (H, W, 3) uint8, into its place in a batch, (H, W, 3) of dtype."""
        out.copy_(self._rows(pixels).view(pixels.shape))

    def _rows(self, pixels: Tensor) -> Tensor:
        rows = pixels.flatten(-2).float()  # (..., H, W, 3) -> (..., H, W * 3)
        return rows.mul_(self._factor).add_(self._offset)
