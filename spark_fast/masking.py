"""The patch mask as a pure function of (seed, step, position in the global batch).

Nothing is drawn from a generator with a state: the mask of an image is the same on any number of ranks, after any
interruption, and on any device, and it is made on the device where it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor


def num_visible(grid: tuple[int, int], mask_ratio: float, *, down: bool = False) -> int:
    """Patches kept per image: h*w*(1 - mask_ratio), rounded as in SparK, or rounded down as in FCMAE and MAE.

    Raises:
        ValueError: a ratio outside (0, 1), or one that leaves no patch visible, or none masked.
    """
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask ratio must be between 0 and 1, got {mask_ratio}")
    patches = grid[0] * grid[1]
    kept = (int if down else round)(patches * (1 - mask_ratio))
    if not 0 < kept < patches:
        what = "no patch visible" if kept == 0 else "no patch masked"
        raise ValueError(
            f"mask ratio {mask_ratio} leaves {what} of the {grid[0]}x{grid[1]} patches of an image; "
            f"use a larger input or another ratio"
        )
    return kept


def check_masks(grid: tuple[int, int], num_visible: int, masks: int) -> None:
    """Raise ValueError if there are not so many masks of an image that share no visible patch; it has the most."""
    patches = grid[0] * grid[1]
    if not 0 < masks * num_visible <= patches:
        raise ValueError(
            f"{masks} masks that each show {num_visible} of the {patches} patches of an image would share some; "
            f"at most {patches // num_visible} do not"
        )


def sample_visible(
    seed: int, step: int | Tensor, positions: Tensor, grid: tuple[int, int], num_visible: int, masks: int = 1
) -> Tensor:
    """The visible patches of the images at `positions` of the global batch of `step`.

    Args:
        positions: (B,) int64, on the device where the mask is wanted.
        num_visible: patches kept per mask.
        masks: of each image; no two of them show the same patch. See `check_masks`.

    Returns:
        (B*masks, L) int64 for L = num_visible, patch indices y*w + x, ascending, the masks of an image next to one
        another: the first has the L patches with the smallest random keys, the next the L after them; so every subset
        is equally likely.
    """
    patches = torch.arange(grid[0] * grid[1], device=positions.device)
    stream = _mix(_mix(torch.full((), seed, dtype=torch.int64, device=positions.device)) + step)
    keys = _mix(_mix(stream + positions)[:, None] + patches)  # (B, h*w)
    return keys.argsort(dim=1)[:, : masks * num_visible].reshape(-1, num_visible).sort(dim=1).values


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 generator's step (Steele, Lea, Flood 2014) on int64, which wraps as uint64 does."""
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: >> on int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
