"""Which patches of a batch are visible, and where their cells lie.

The mask is drawn on patches as large as the network's total stride P, so at every feature level a patch is
a whole block of b x b cells (P = 32: b = 8 at stride 4, 4 at stride 8, ...). Every image keeps the same number
L of patches. The features of B images are then *packed* into an ordinary 4-D tensor

    x: (V, C, b, b) channels_last,  V = B*L visible patches, image-major

which in memory is a list of V*b*b rows of C channels. Everything here is an index into that list, made from the
mask by arithmetic, once per step; all shapes follow from (B, L, h, w), so nothing recompiles and nothing is
copied to the host.

Names: B images, (h, w) patches per image, L visible patches per image, V = B*L, b cells per patch side,
C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spark_fast.autograd import AutogradContext

Table = TypeVar("Table")


class Places(NamedTuple):
    """The places of a window around each patch, as cell coordinates along the two axes relative to the patch.

    -1 is the last cell of the neighbour before it, b the first of the one after it; in any order and as often as
    wanted. With taps (ky, kx) the ky*kx inputs of one output cell stand together: the places run
    (ny/ky, nx/kx, ky, kx).
    """

    ys: tuple[int, ...]
    xs: tuple[int, ...]
    taps: tuple[int, int] = (1, 1)

    @property
    def size(self) -> int:
        """Places per patch."""
        return len(self.ys) * len(self.xs)


class VisiblePatches:
    """The visible patches of one batch.

    Args:
        index: (B, L) int64, the visible patches of each image as y*w + x, ascending.
        grid: (h, w), patches per image.
    """

    def __init__(self, index: Tensor, grid: tuple[int, int]) -> None:
        self.index = index
        self.grid = grid
        self.batch, self.num_visible = index.shape
        self.count = self.batch * self.num_visible
        self.ratio = self.num_visible / (grid[0] * grid[1])  # of all patches
        images = torch.arange(self.batch, device=index.device)[:, None]
        self.patches = (images * (grid[0] * grid[1]) + index).flatten()  # (V,) in the B*h*w patches of the batch
        self._tables: dict[tuple, Any] = {}

    @classmethod
    def from_mask(cls, mask: Tensor) -> VisiblePatches:
        """From a bool mask (B, h, w), True where visible.

        Raises:
            ValueError: the images keep different numbers of patches, or none. (Reading the number back is a
                host synchronisation: a training loop makes the index itself, see `sample_visible`.)
        """
        if mask.dtype != torch.bool or mask.dim() != 3:
            raise ValueError(f"visible must be a bool tensor (B, h, w), got {mask.dtype} {tuple(mask.shape)}")
        kept = mask.flatten(1).sum(1)
        low, high = int(kept.min()), int(kept.max())
        if low != high or low == 0:
            raise ValueError(f"every image must keep the same number of patches, at least one; got {low} to {high}")
        grid = (mask.shape[1], mask.shape[2])
        return cls(_first_true(mask.flatten(1))[:, :low], grid)

    @property
    def mask(self) -> Tensor:
        """(B, h, w) bool, True where visible."""
        flat = torch.zeros(self.batch, self.grid[0] * self.grid[1], dtype=torch.bool, device=self.index.device)
        return flat.scatter(1, self.index, True).view(self.batch, *self.grid)

    def complement(self) -> VisiblePatches:
        """The masked patches of the same batch."""
        holes = self.grid[0] * self.grid[1] - self.num_visible
        return VisiblePatches(_first_true(~self.mask.flatten(1))[:, :holes], self.grid)

    def cached_table(self, key: tuple, make: Callable[[], Table]) -> Table:
        """A table that follows from the mask: made by `make` the first time that `key` is asked for, then kept."""
        if key not in self._tables:
            self._tables[key] = make()
        return self._tables[key]

    def cells(self, height: int) -> Tensor:
        """(B, 1, height, width) bool: the visible cells of a dense map of that height."""

        def make() -> Tensor:
            b = height // self.grid[0]
            return self.mask.repeat_interleave(b, 1).repeat_interleave(b, 2)[:, None]

        return self.cached_table(("cells", height), make)

    @property
    def neighbours(self) -> Tensor:
        """(V, 3, 3) int64: the packed number of each patch's neighbours, V where masked or outside the image."""
        return self.neighbourhood(1, torch.int64)

    def neighbourhood(self, reach: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """(V, 2*reach+1, 2*reach+1): as `neighbours`, further."""

        def make() -> Tensor:
            (h, w), side = self.grid, 2 * reach + 1
            numbers = torch.arange(self.count, device=self.index.device, dtype=dtype).view(self.batch, self.num_visible)
            full = torch.full((self.batch, h * w), self.count, device=self.index.device, dtype=dtype)
            full = full.scatter(1, self.index, numbers).view(self.batch, h, w)
            lookup = torch.nn.functional.pad(full, (reach,) * 4, value=self.count)  # (B, h + 2*reach, w + 2*reach)
            around = lookup.unfold(1, side, 1).unfold(2, side, 1).reshape(-1, side, side)  # (B*h*w, side, side)
            return around.index_select(0, self.patches)

        return self.cached_table(("neighbourhood", reach, dtype), make)

    def segments(self, b: int, images: int | None = None) -> Tensor:
        """(V*b,) int64: patch rows of b cells, in a dense map seen as (B*h*b*w, b*C).

        With `images`, in a map of so many images instead, each of which has B / images masks next to one another.

        A row of cells inside a patch is contiguous in a channels_last map, so packing and unpacking move b*C
        numbers per index instead of C.
        """

        masks = self.batch // (images or self.batch)

        def make() -> Tensor:
            h, w = self.grid
            patches = self.patches
            if masks > 1:
                owner = torch.arange(self.batch, device=patches.device).div(masks, rounding_mode="floor")
                patches = (owner[:, None] * (h * w) + self.index).flatten()
            top, left = patches // w, patches % w  # patch row in the batch, patch column
            rows = top[:, None] * b + torch.arange(b, device=top.device)  # (V, b) pixel rows in the batch
            return (rows * w + left[:, None]).flatten()

        return self.cached_table(("segments", b, masks), make)

    def pack(self, dense: Tensor) -> Tensor:
        """Take the visible patches out of a dense map: (B, C, h*b, w*b) -> (V, C, b, b).

        A map of B / K images serves K masks each, which stand next to one another: nothing is copied but the patches.
        """
        b = dense.shape[2] // self.grid[0]
        rows = collect_segments(dense, b, self.segments(b, len(dense)))
        return rows.view(self.count, b, b, dense.shape[1]).permute(0, 3, 1, 2)

    def unpack(self, packed: Tensor, fill: Tensor | None = None) -> Tensor:
        """Put packed patches back: (V, C, b, b) -> (B, C, h*b, w*b), `fill` (C values, default 0) elsewhere."""
        c, b = packed.shape[1], packed.shape[2]
        rows = packed.permute(0, 2, 3, 1).reshape(-1, b * c)
        to = c, b, (self.batch, *self.grid), self.segments(b)
        if fill is not None and rows.is_cuda:
            return _LayAroundFill.apply(rows, fill.to(rows.dtype), *to)
        return lay_segments(rows, *to, fill)

    def repeat_images(self, images: Tensor) -> Tensor:
        """One image per mask: (B / K, C, H, W) -> (B, C, H, W), the same where K is 1."""
        masks = self.batch // len(images)
        return images if masks == 1 else images.repeat_interleave(masks, 0)

    def as_images(self, packed: Tensor) -> Tensor:
        """The visible cells of each image as one tall picture: (V, C, b, b) -> (B, C, L*b, b), without a copy.

        A layer that mixes an image (squeeze-and-excite, GroupNorm, GRN) runs on this view unchanged.
        """
        c, b = packed.shape[1], packed.shape[2]
        return packed.permute(0, 2, 3, 1).reshape(self.batch, self.num_visible * b, b, c).permute(0, 3, 1, 2)

    def as_patches(self, images: Tensor) -> Tensor:
        """The inverse of `as_images`: (B, C, L*b, b) -> (V, C, b, b)."""
        c, b = images.shape[1], images.shape[3]
        return images.permute(0, 2, 3, 1).reshape(self.count, b, b, c).permute(0, 3, 1, 2)

    def spread(self, images: Tensor) -> Tensor:
        """One value per image to one per patch: (B, ...) -> (V, ...)."""
        return images[:, None].expand(-1, self.num_visible, *images.shape[1:]).flatten(0, 1)

    def window_table(self, b: int, places: Places) -> Tensor:
        """(V * places,) int64: which packed row stands at each place of each patch's window.

        V*b*b stands for "nothing there" (masked or outside).
        """

        def make() -> Tensor:
            device, (ky, kx) = self.index.device, places.taps
            ys, xs = (_numbers(axis, device) for axis in places[:2])
            down, along = (axis.div(b, rounding_mode="floor") for axis in (ys, xs))  # which neighbour: -1, 0, 1
            patch = self.neighbours[:, down + 1][:, :, along + 1]  # (V, ny, nx)
            table = patch * (b * b) + (ys - down * b)[:, None] * b + (xs - along * b)
            table = table.clamp(max=self.count * b * b).view(-1, len(ys) // ky, ky, len(xs) // kx, kx)
            return table.transpose(2, 3).flatten()  # (V, ny/ky, nx/kx, ky, kx), as one row

        return self.cached_table(("window", b, places), make)

    def cell_table(self, b: int, places: Places) -> Tensor:
        """(V*b*b, K) int64: every place of every window in which a cell stands; the transpose of `window_table`.

        V*places stands for "no further place". K is at most (1 + ceil(halo / b))^2 for a plain window, so the
        backward pass is a gather and a sum: no atomics, and the same order of additions every time.
        """

        def make() -> Tensor:
            device, (ky, kx) = self.index.device, places.taps
            (steps_y, at_y), (steps_x, at_x) = (
                [_numbers([n for row in t for n in row], device).view(b, -1) for t in _shown(b, axis)]
                for axis in places[:2]
            )  # (b, Sy) and (b, Sx) each
            patch = self.neighbours[:, steps_y + 1][:, :, :, steps_x + 1]  # (V, b, Sy, b, Sx)
            down = (at_y.div(ky, rounding_mode="floor") * len(places.xs) * ky) + at_y % ky * kx
            along = at_x.div(kx, rounding_mode="floor") * ky * kx + at_x % kx
            at = patch * places.size + down[:, :, None, None] + along
            nothing = (at_y < 0)[:, :, None, None] | (at_x < 0)
            at = at.masked_fill(nothing, self.count * places.size).clamp(max=self.count * places.size)
            return at.transpose(2, 3).reshape(self.count * b * b, -1)  # (V, b, b, Sy, Sx) -> (V*b*b, K)

        return self.cached_table(("cell", b, places), make)


def lay_segments(
    rows: Tensor, c: int, b: int, grid: tuple[int, int, int], segments: Tensor, fill: Tensor | None = None
) -> Tensor:
    """Patch rows, in memory (V*b, b*C) -> (B, C, h*b, w*b), `fill` (C values, default 0) in the holes.

    `grid` is (B, h, w). A function of tensors alone, so that a compiled autograd function can call it.
    """
    batch, h, w = grid
    shape = (batch * h * b * w, b * c)
    dense = rows.new_zeros(shape) if fill is None else fill.to(rows.dtype).repeat(b).expand(shape).contiguous()
    dense = dense.index_copy_(0, segments, rows.view(-1, b * c))  # in place: it is new, a copy would cost its size
    return dense.view(batch, h * b, w * b, c).permute(0, 3, 1, 2)


def collect_segments(dense: Tensor, b: int, segments: Tensor) -> Tensor:
    """The inverse: (B, C, h*b, w*b) -> patch rows (V*b, b*C)."""
    return dense.permute(0, 2, 3, 1).reshape(-1, b * dense.shape[1]).index_select(0, segments)


class _LaidContext(AutogradContext, Protocol):
    b: int


class _LayAroundFill(torch.autograd.Function):
    """`lay_segments` with a fill, whose gradient is a product over the map: autograd's own writes the map once more.

    For a GPU, where passes over memory count; on a CPU the sums keep their order.
    """

    @staticmethod
    def forward(
        ctx: _LaidContext, rows: Tensor, fill: Tensor, c: int, b: int, grid: tuple[int, int, int], segments: Tensor
    ) -> Tensor:
        ctx.b = b
        ctx.save_for_backward(segments)
        return lay_segments(rows, c, b, grid, segments, fill)

    @staticmethod
    @once_differentiable
    def backward(ctx: _LaidContext, grad: Tensor) -> tuple:
        (segments,), c = ctx.saved_tensors, grad.shape[1]
        rows = grad.permute(0, 2, 3, 1).reshape(-1, ctx.b * c)  # (B*h*b*w, b*C)
        hole = torch.ones(len(rows), dtype=rows.dtype, device=rows.device).index_fill_(0, segments, 0)
        return rows.index_select(0, segments), (hole @ rows).view(ctx.b, c).sum(0), None, None, None, None


def _shown(b: int, coords: tuple[int, ...]) -> tuple[list[list[int]], list[list[int]]]:
    """For each cell of a patch, along one axis: (neighbour whose window shows it, place in that window).

    The neighbour at step d sees my cell y at its coordinate y - d*b. Padded with place -1 to equal length.
    """
    shown: list[list[tuple[int, int]]] = [[] for _ in range(b)]
    for i, at in enumerate(coords):
        shown[at % b].append((-(at // b), i))
    width = max(len(s) for s in shown)
    padded = [s + [(0, -1)] * (width - len(s)) for s in shown]
    return [[d for d, _ in s] for s in padded], [[i for _, i in s] for s in padded]


def _numbers(values: Sequence[int], device: torch.device) -> Tensor:
    """(n,) int64. Copying a list to a GPU would make the host wait, so there it is computed on the device."""
    return _in_runs(values, device) if device.type == "cuda" else torch.tensor(values, device=device)


def _in_runs(values: Sequence[int], device: torch.device) -> Tensor:
    """(n,) int64, joined from runs of even steps."""
    runs, begin = [], 0
    while begin < len(values):
        step = values[begin + 1] - values[begin] if begin + 1 < len(values) else 0
        end = begin + 1
        while end < len(values) and values[end] - values[end - 1] == step:
            end += 1
        runs.append(torch.arange(end - begin, device=device) * step + values[begin])
        begin = end
    return torch.cat(runs)


def _first_true(flat: Tensor) -> Tensor:
    """Positions along dim 1 of (B, n) bool, the True ones first, each group ascending."""
    return flat.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
