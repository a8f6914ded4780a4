"""Draw what packing does to a mask: the map, the packed patches, and the window that a 3x3 convolution sees of each.

    python docs/generate/draw_packed.py               # docs/pictures/packed.png

Every cell has the colour of its patch, and the real code moves them: `VisiblePatches.pack`, and `window_table` for the
halos. So the colours in a window's border show from which neighbours its cells came. Needs matplotlib.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from spark_fast.encoder import VisiblePatches
from spark_fast.encoder.conv.geometry import layer_axes
from spark_fast.encoder.visible import Places
from spark_fast.errors import SettingsError, StorageError
from spark_fast.files import atomic_write
from spark_fast.masking import num_visible, sample_visible

PICTURE = Path(__file__).parents[1] / "pictures" / "packed.png"
COLUMNS = 4  # packed patches in a row of the picture
HOLE, NOTHING = 0.85, 1.0  # grey of masked cells, and of places in a window where there is nothing


@dataclass
class Drawn:
    """Colours in [0, 1]; V visible patches, b cells, window n = lo + b + hi."""

    dense: Tensor  # (h*b, w*b, 3), the masked map
    packed: Tensor  # (V, b, b, 3)
    windows: Tensor  # (V, n, n, 3)


def draw_packed(
    *,
    grid: tuple[int, int] = (4, 5),
    cells: int = 4,
    mask_ratio: float = 0.6,
    seed: int = 6,
    out: Path = PICTURE,
) -> int:
    """Draw what packing does to a mask.

    Args:
        grid: Patches (h, w) of the image.
        cells: Per side of a patch: 4 is stride 8 where patches are 32 px.
        mask_ratio: Share of the patches hidden.
        seed: Of the mask.
        out: The picture to write, .png.
    """
    if out.suffix != ".png":
        raise SettingsError(f"{out} must end with .png")
    if min(*grid, cells) < 1:
        raise SettingsError(f"--grid and --cells must be 1 or more, got {grid[0]} {grid[1]} and {cells}")
    try:
        drawn = arrange(grid, cells, mask_ratio, seed)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    picture = draw(drawn)
    with atomic_write(out) as file:
        file.write(picture)
    print(f"{out}: {len(drawn.packed)} visible patches")
    return 0


def arrange(grid: tuple[int, int], b: int, mask_ratio: float, seed: int) -> Drawn:
    """Pack a map of (h, w) patches, b x b cells each, whose every visible patch has a colour of its own.

    Raises:
        ValueError: a mask ratio that does not fit the grid.
    """
    index = sample_visible(seed, 0, torch.zeros(1, dtype=torch.int64), grid, num_visible(grid, mask_ratio))
    seen = VisiblePatches(index, grid)
    one_each = _colours(seen.count)[:, :, None, None].expand(-1, -1, b, b)
    dense = seen.unpack(one_each, fill=torch.full((3,), HOLE))  # (1, 3, h*b, w*b), the masked map
    packed = seen.pack(dense)  # (V, 3, b, b)
    y, x = layer_axes(torch.nn.Conv2d(3, 3, 3, padding=1))
    table = seen.window_table(b, Places(y.window(b), x.window(b)))
    rows = torch.cat([packed.permute(0, 2, 3, 1).reshape(-1, 3), torch.full((1, 3), NOTHING)])  # (V*b*b + 1, 3)
    windows = rows[table].view(seen.count, len(y.window(b)), len(x.window(b)), 3)
    return Drawn(dense[0].permute(1, 2, 0), packed.permute(0, 2, 3, 1), windows)


def _colours(count: int) -> Tensor:
    """(count, 3), all around the colour circle."""
    hue = 6 * torch.arange(count) / count
    circle = torch.stack([((hue + shift) % 6 - 3).abs() - 1 for shift in (0, 4, 2)], 1).clamp(0, 1)
    return 0.25 + 0.6 * circle


def draw(drawn: Drawn) -> bytes:
    """A PNG of three panels."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SettingsError("drawing needs matplotlib: pip install matplotlib") from None
    count, b, n = len(drawn.packed), drawn.packed.shape[1], drawn.windows.shape[1]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    parts: Any = figure.subfigures(1, 3)
    mosaics = ([drawn.dense], list(drawn.packed), list(drawn.windows))
    titles = (
        "a feature map and its mask",
        f"packed: (V, C, {b}, {b}), here V = {count}",
        f"windows of a 3x3 convolution: {n} x {n}",
    )
    for part, tiles, title in zip(parts, mosaics, titles, strict=True):
        part.suptitle(title, fontsize=10)
        columns = min(COLUMNS, len(tiles))
        panels = part.subplots(-(-len(tiles) // columns), columns, squeeze=False).flatten()
        for panel in panels:
            panel.axis("off")
        for panel, tile in zip(panels, tiles, strict=False):
            _tile(panel, tile.numpy(), b, inset=(n - b) // 2 if tiles is mosaics[2] else 0)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=90, metadata={"Software": None})
    return content.getvalue()


def _tile(panel: Any, colours: Any, b: int, inset: int) -> None:
    """One map or window with its cells; around each patch of b x b, the first of which begins at `inset`, a frame."""
    height, width, _ = colours.shape
    panel.imshow(colours, interpolation="nearest", extent=(0, width, height, 0))
    panel.vlines(range(width + 1), 0, height, color="0.75", linewidth=0.4)
    panel.hlines(range(height + 1), 0, width, color="0.75", linewidth=0.4)
    for y in range(inset, height - b + 1, b):
        for x in range(inset, width - b + 1, b):
            panel.plot([x, x + b, x + b, x, x], [y, y, y + b, y + b, y], color="black", linewidth=0.9)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        return tyro.cli(draw_packed, args=argv, use_underscores=True, prog="draw_packed.py", description=__doc__)
    except (SettingsError, OSError) as error:
        print(f"draw_packed: {error}", file=sys.stderr)
        return getattr(error, "exit_code", StorageError.exit_code)


if __name__ == "__main__":
    sys.exit(main())
