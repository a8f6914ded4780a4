"""Augmentation where the batch is used: the host decodes and copies crops, the device does the arithmetic.

The host puts the pixels of each crop into the corner of a cell, all cells of one size, so that shapes are static
whatever the images are. On the device an antialiased bicubic resize of B different crops is two batched matrix
products, W_y @ cell @ W_x^T, with the weights of each sample's size; zero weights skip the rest of the cell, and
weights in reverse order flip. Then clamp, normalise and cast. Nothing here is compiled: the loader's threads call it
while the model may be compiling, and before torch 2.14 one compilation breaks another in the same process.
"""

from __future__ import annotations

import torch
from numpy.typing import NDArray
from torch import Tensor

from spark_fast.pipelines.transforms.crops import Box, Turn
from spark_fast.pipelines.transforms.resize import MEAN, STD, crop, cut, transposed

CELL = 2  # sides of a cell, in input sizes


class DeviceAugment:
    """Crops in cells to normalised images of `input_size` (H, W), (B, 3, H, W) of `dtype`, channels_last."""

    def __init__(self, input_size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> None:
        self.input_size, self._dtype = input_size, dtype
        self.cell = (CELL * input_size[0], CELL * input_size[1])  # height, width
        self._mean = 255 * torch.tensor(MEAN, device=device)[:, None, None]  # (3, 1, 1)
        self._std = 255 * torch.tensor(STD, device=device)[:, None, None]
        # fp16 holds bytes exactly and weights to 2^-12; the products are summed in fp32 by the tensor cores
        self._compute = torch.float16 if device.type == "cuda" else torch.float32

    def holds(self, height: int, width: int) -> bool:
        """Whether a crop of this size fits into a cell."""
        return height <= self.cell[0] and width <= self.cell[1]

    def put(self, image: NDArray, box: Box, turn: int, cell: Tensor) -> tuple[int, int, int]:
        """On the host: copy the crop `box` of `image` (h, w, C) into the corner of `cell`, (2H, 2W, C).

        A `turn` that transposes is transposed here; its flips are left to the device. A crop that does not fit is
        resized here, to the input's size. Returns height, width and remaining turn of the pixels in the cell.
        """
        height, width = (box.width, box.height) if turn & Turn.TRANSPOSED else (box.height, box.width)
        if self.holds(height, width):
            cell.numpy()[:height, :width] = transposed(crop(image, box), turn)
        else:
            height, width = self.input_size
            self._cut(image, box, turn & Turn.TRANSPOSED, cell[:height, :width])
        return height, width, turn & ~Turn.TRANSPOSED

    def _cut(self, image: NDArray, box: Box, turn: int, out: Tensor) -> None:
        cut(image, box, turn, out)

    def __call__(self, cells: Tensor, crops: Tensor) -> Tensor:
        """Cells (B, *cell, 3) uint8 and what `put` returned for each, (B, 3) int64, on the device -> (B, 3, H, W)."""
        images = (self._resized(cells, crops).clamp(0, 255) - self._mean) / self._std
        return images.to(self._dtype, memory_format=torch.channels_last)

    def _resized(self, cells: Tensor, crops: Tensor) -> Tensor:
        """(B, *cell, C) of any dtype -> (B, C, H, W) fp32, in the same units."""
        count, rows, columns, channels = cells.shape
        height, width = self.input_size
        across = _flipped(bicubic_weights(crops[:, 1], columns, width), crops, Turn.MIRRORED)  # (B, W, columns)
        down = _flipped(bicubic_weights(crops[:, 0], rows, height), crops, Turn.UPSIDE_DOWN)  # (B, H, rows)
        flat = cells.to(self._compute).view(count, rows, columns * channels)
        pixels = torch.bmm(down.to(self._compute), flat)  # (B, H, columns * C)
        planes = pixels.view(count, height, columns, channels).permute(0, 3, 1, 2)
        planes = planes.reshape(count, channels * height, columns)
        return torch.bmm(planes, across.to(self._compute).mT).view(count, channels, height, width).float()


def _flipped(weights: Tensor, crops: Tensor, flip: Turn) -> Tensor:
    """The weights, (B, out, in), in reverse order where the crop's turn has this flip."""
    return torch.where((crops[:, 2, None, None] & int(flip)) != 0, weights.flip(1), weights)


def cubic(x: Tensor) -> Tensor:
    """The cubic convolution kernel with a = -1/2 (R. Keys, IEEE ASSP 29, 1981) at distances `x` of any shape."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def bicubic_weights(sizes: Tensor, longest: int, out: int) -> Tensor:
    """Pillow's antialiased bicubic resize of lines as matrices: `sizes[i]` pixels to `out` pixels.

    The kernel is `cubic`, stretched by the reduction, its weights normalised at the borders
    (precompute_coeffs in Pillow's src/libImaging/Resample.c).

    Args:
        sizes: (B,), each between 1 and `longest`.

    Returns:
        (B, out, longest) fp32; zero from column sizes[i] on.
    """
    scale = (sizes.float() / out)[:, None, None]
    centre = (torch.arange(out, device=sizes.device)[:, None] + 0.5) * scale  # (B, out, 1)
    pixel = torch.arange(longest, device=sizes.device)
    weights = cubic((pixel + 0.5 - centre) / scale.clamp(min=1))  # (B, out, longest)
    weights = torch.where(pixel < sizes[:, None, None], weights, 0.0)
    return weights / weights.sum(2, keepdim=True)
