"""Pictures of what the model fills in: input, masked, reconstruction, side by side."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from spark_fast.encoder import Visible
from spark_fast.masking import sample_visible
from spark_fast.spark import SparK

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as the pipelines normalise


def reconstruction_grid(model: SparK, images: Tensor, seed: int) -> Tensor:
    """One row per image: input, visible part, reconstruction.

    Args:
        images: (N, 3, H, W) normalised. The masks depend on `seed` alone.

    Returns:
        (3, H', W') uint8 on the host.
    """
    positions = torch.arange(len(images), device=images.device)
    visible = sample_visible(seed, 0, positions, model.grid, model.num_visible)
    training = model.training
    model.eval()  # running statistics, and they are not changed
    filled = model.reconstruct(images, visible)
    model.train(training)
    seen = Visible(visible, model.grid).cells(images.shape[2])
    columns = [_pixels(images), torch.where(seen, _pixels(images), 0.5), _pixels(filled)]
    rows = torch.stack(columns, dim=1).flatten(0, 1)  # (N, 3 columns, 3, H, W) -> (N*3, 3, H, W)
    return (make_grid(rows, nrow=3, padding=4, pad_value=1.0) * 255).round().to(torch.uint8).cpu()


def save_png(grid: Tensor, path: Path) -> None:
    """Write (3, H, W) uint8."""
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


def _pixels(images: Tensor) -> Tensor:
    """Undo the normalisation, to [0, 1]."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return (images.float() * std + mean).clamp(0, 1)
