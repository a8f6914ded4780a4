"""A mask of your own for the pictures: as rows of text, or as a small picture.

    .##....        one character per patch: `.` is visible, `#` hidden
    .##....

In a picture bright patches are visible and dark ones hidden; it has a pixel per patch, or a block of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

VISIBLE, HIDDEN = ".", "#"


def read_mask(words: Sequence[str], grid: tuple[int, int]) -> Tensor:
    """Read a mask: (h, w) bool, True where visible.

    Args:
        words: the rows; or one file, a text of rows or a picture.

    Raises:
        ValueError: another size than the grid, another character, or nothing visible, or nothing hidden.
    """
    path = Path(words[0])
    if len(words) == 1 and path.is_file():
        try:
            mask = _from_picture(path, grid)
        except UnidentifiedImageError:
            mask = _from_rows(_lines(path), grid)
    elif len(words) == 1 and path.suffix and set(words[0]) - {VISIBLE, HIDDEN}:
        raise ValueError(f"there is no mask file {path}")
    else:
        mask = _from_rows(words, grid)
    if mask.all() or not mask.any():
        raise ValueError(f"the mask hides {'every' if not mask.any() else 'no'} patch: hide some and show some")
    return mask


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").split() if line]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is neither a picture nor a text of {VISIBLE} and {HIDDEN}") from None


def _from_rows(rows: Sequence[str], grid: tuple[int, int]) -> Tensor:
    h, w = grid
    if len(rows) != h or any(len(row) != w for row in rows):
        lengths = sorted({len(row) for row in rows})
        raise ValueError(
            f"the mask must have {h} rows of {w} characters, one per patch; "
            f"it has {len(rows)} of {' to '.join(map(str, lengths[:: max(1, len(lengths) - 1)]))}"
        )
    odd = sorted(set("".join(rows)) - {VISIBLE, HIDDEN})
    if odd:
        raise ValueError(f"a mask is written with {VISIBLE} (visible) and {HIDDEN} (hidden), not {' '.join(odd)}")
    return torch.tensor([[character == VISIBLE for character in row] for row in rows])


def _from_picture(path: Path, grid: tuple[int, int]) -> Tensor:
    h, w = grid
    with Image.open(path) as picture:
        width, height = picture.size
        if height % h or width % w:
            raise ValueError(f"{path} is {width}x{height} pixels: the mask needs {w}x{h}, or a multiple of it")
        pixels = torch.tensor(list(picture.convert("L").tobytes())).view(h, height // h, w, width // w)
    return pixels.float().mean((1, 3)) >= 128  # of each patch
