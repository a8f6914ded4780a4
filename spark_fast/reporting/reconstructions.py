"""Pictures of what the model fills in: input, masked, reconstruction, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from spark_fast.encoder import VisiblePatches
from spark_fast.errors import DataError, ImageError
from spark_fast.files import atomic_write
from spark_fast.method import Method
from spark_fast.pipelines.transforms.crops import centre_box
from spark_fast.pipelines.transforms.decode import decode
from spark_fast.pipelines.transforms.resize import MEAN, STD, Normalise, cut


def reconstruction_grid(model: Method, images: Tensor, seed: int, keep: int | None = None) -> Tensor:
    """One row per image: input, visible part, reconstruction. The masks depend on `seed` alone.

    Args:
        images: (N, 3, H, W) normalised.
        keep: visible patches per image, None for as many as in training.

    Returns:
        (3, H', W') uint8 on the host.
    """
    positions = torch.arange(len(images), device=images.device)
    return filled_grid(model, images, model.sample_masks(seed, 0, positions, keep=keep))


def filled_grid(model: Method, images: Tensor, visible: Tensor) -> Tensor:
    """The same with masks of your choice: (N, L) int64, the visible patches of each image, ascending."""
    training = model.training
    model.eval()  # running statistics, and they are not changed
    filled = model.reconstruct(images, visible)
    model.train(training)
    seen = VisiblePatches(visible, model.grid).cells(images.shape[2])
    columns = [_pixels(images), torch.where(seen, _pixels(images), 0.5), _pixels(filled)]
    rows = torch.stack(columns, dim=1).flatten(0, 1)  # (N, 3 columns, 3, H, W) -> (N*3, 3, H, W)
    return (make_grid(rows, nrow=3, padding=4, pad_value=1.0) * 255).round().to(torch.uint8).cpu()


def open_images(paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Images as the network sees them in evaluation: centrally cropped, resized, normalised, (N, 3, *size).

    Raises:
        DataError: one cannot be read, by name.
    """
    pixels = torch.empty(len(paths), *size, 3, dtype=torch.uint8)
    for path, out in zip(paths, pixels, strict=True):
        try:
            image, _ = decode(path.read_bytes())
        except (OSError, ImageError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        cut(image, centre_box(image.shape[0], image.shape[1], size), flip=False, out=out)
    return Normalise(size[1], torch.device("cpu"), torch.float32)(pixels)


def save_png(grid: Tensor, path: Path) -> None:
    """Write (3, H, W) uint8, whole or not at all. Raises OSError."""
    image = Image.fromarray(grid.permute(1, 2, 0).numpy())
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def _pixels(images: Tensor) -> Tensor:
    """Undo the normalisation, to [0, 1]."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return (images.float() * std + mean).clamp(0, 1)
