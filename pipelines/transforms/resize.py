"""From decoded pixels to network input: crop, antialiased bicubic resize, flip; then normalise.

The first three run per image on the CPU, in uint8, straight into the batch's buffer. The resize is
torch's uint8 kernel, derived from Pillow's: it differs from the PIL resize of the published code by
0.02/255 on average, and costs half. Normalising is left to the device and the whole batch: bytes are a
quarter of what fp32 would put through memory and over the bus.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from spark_fast.pipelines.transforms.crops import Box, Turn

# ImageNet's, of pixels in [0, 1] (timm.data.constants)
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def cut(image: NDArray[np.uint8], box: Box, turn: int, out: Tensor) -> None:
    """Crop `image` (h, w, 3) to `box`, resize it to the size of `out` (H, W, 3) uint8, turn it, store it there."""
    height, width, _ = out.shape
    out.copy_(resized_crop(image, box, turn, (height, width)))


def resized_crop(image: NDArray[np.uint8], box: Box, turn: int, size: tuple[int, int]) -> Tensor:
    """What `cut` stores: (*size, 3) uint8; `turn`: a `Turn`."""
    return flipped(torch.from_numpy(resize(transposed(crop(image, box), turn), size)), turn)


def crop(image: NDArray, box: Box) -> NDArray:
    """The part of an image, (h, w, C), inside a box, as a view."""
    return image[box.top : box.top + box.height, box.left : box.left + box.width]


def transposed(pixels: NDArray, turn: int) -> NDArray:
    """The first half of a `Turn`, before the resize: (h, w, C) -> (w, h, C) if it is transposed."""
    return np.ascontiguousarray(pixels.swapaxes(0, 1)) if turn & Turn.TRANSPOSED else pixels


def flipped(pixels: Tensor, turn: int) -> Tensor:
    """The second half, after it: (H, W, C), flipped as the `Turn` says."""
    sides = [side for side, bit in ((0, Turn.UPSIDE_DOWN), (1, Turn.MIRRORED)) if turn & bit]
    return pixels.flip(sides) if sides else pixels


def resize(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Antialiased bicubic: (h, w, 3) -> (*size, 3) uint8.

    NumPy moves the axes: each of torch's calls releases the GIL, and may have to wait to get it back.
    """
    # reshape, not [None]: with a stride of 0 torch would take the batch of one for planes and be twice as slow
    pixels = image.reshape(1, *image.shape).transpose(0, 3, 1, 2)  # (h, w, 3) -> (1, 3, h, w), channels_last
    resized = interpolate(torch.from_numpy(pixels), size=size, mode="bicubic", antialias=True).numpy()
    return resized[0].transpose(1, 2, 0)  # (1, 3, H, W) -> (H, W, 3)


class Normalise:
    """uint8 (B, H, W, C) -> dtype (B, C, H, W), channels_last, (pixel / 255 - mean) / std, for each of C channels.

    The channels' factors are laid out along a whole row of pixels: broadcasting over an innermost
    dimension of 3 is 4 to 12 times slower on a CPU.
    """

    def __init__(
        self,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        means, stds = torch.tensor(mean), torch.tensor(std)
        self._factor = (1 / (255 * stds)).repeat(width).to(device)  # (W * C,)
        self._offset = (-means / stds).repeat(width).to(device)
        self._dtype = dtype

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise a batch in fp32 on the device of its pixels, then cast to dtype."""
        rows = torch.addcmul(self._offset, pixels.flatten(-2), self._factor)  # (B, H, W * C)
        return rows.to(self._dtype).view(pixels.shape).permute(0, 3, 1, 2)  # -> (B, C, H, W), channels_last

    def into(self, out: Tensor, pixels: Tensor) -> None:
        """The same for one image, (H, W, C) uint8, into its place in a batch, (H, W, C) of dtype."""
        rows = out.view(len(out), -1)  # (H, W, C) -> (H, W * C)
        torch.addcmul(self._offset, pixels.flatten(-2), self._factor, out=rows)
