"""From the packed encoder to the dense decoder: mask tokens in the holes of a level, then a projection.

The projection is linear, and the holes all hold the same token. So

    project(unpack(x, fill=token)) = what the visible cells add to the cells around them, at their share of the cost,
                                   + what the token adds, which is computed once.

A 1x1 projection stays in its cell: it takes the packed rows and the token, before they are put in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spark_fast.autograd import AutogradContext, cast_for_autocast
from spark_fast.decoder.gpu_costs import projection_costs
from spark_fast.encoder.visible import VisiblePatches

ADDRESSING = 28  # fitted to 24 projections on two CPU cores: to address nine taps costs 28/C of the dense products


def sparse_pays(x: Tensor, visible_ratio: float, width: int) -> bool:
    """Whether a 3x3 projection of (V, C, b, b) to `width` channels is faster from its visible share `visible_ratio`.

    By a constant measured on CPUs, by a model on a GPU (`gpu_costs`); elsewhere not.
    """
    if x.is_cuda:
        costs = projection_costs(round(x.numel() / x.shape[1] / visible_ratio), visible_ratio, x.shape[1], width)
        return costs["visible"] < costs["all"]
    return x.device.type == "cpu" and visible_ratio + ADDRESSING / x.shape[1] < 1


def densify(
    x: Tensor, token: Tensor, project: nn.Module, visible: VisiblePatches, sparse: bool | None = None
) -> Tensor:
    """project(visible.unpack(x, fill=token)), to rounding.

    Args:
        x: (V, C, b, b), a level of the packed encoder.
        token: (C,).
        project: the identity, or a Conv2d of 1x1 or 3x3 that keeps the size.
        sparse: compute it from the visible cells; None: where that pays (`sparse_pays`).

    Returns:
        (B, N, h*b, w*b).
    """
    pointwise = isinstance(project, nn.Conv2d) and project.kernel_size == (1, 1)
    if sparse is None:
        sparse = pointwise or (isinstance(project, nn.Conv2d) and sparse_pays(x, visible.ratio, project.out_channels))
    if not sparse or not isinstance(project, nn.Conv2d):
        return project(visible.unpack(x, fill=token))
    weight, bias = project.weight, project.bias
    assert bias is not None
    x, token, weight, bias = cast_for_autocast(x, token, weight, bias)
    c, b = x.shape[1:3]
    rows = x.permute(0, 2, 3, 1).reshape(-1, c)  # (V*b*b, C)
    if pointwise:
        both = F.linear(torch.cat([rows, token[None]]), weight.flatten(1), bias)
        packed = both[:-1].view(-1, b, b, len(weight)).permute(0, 3, 1, 2)
        return visible.unpack(packed, fill=both[-1])
    taps, outputs, holes = _tables(visible, b)
    dense = _Project.apply(rows, token, weight, taps, outputs, holes) + bias
    return dense.view(visible.batch, visible.grid[0] * b, visible.grid[1] * b, len(weight)).permute(0, 3, 1, 2)


class _Project(torch.autograd.Function):
    """Rows (n, C) of visible cells, token (C,), weight (N, C, 3, 3) -> rows (B*H*W, N) of the dense map.

    Forward the nine contributions of each row, then their sums; backward the nine gradients of each cell, gathered,
    and of the token, summed over the holes.
    """

    @staticmethod
    def forward(
        ctx: AutogradContext, rows: Tensor, token: Tensor, weight: Tensor, taps: Tensor, outputs: Tensor, holes: Tensor
    ) -> Tensor:
        rows = torch.cat([rows, token[None], rows.new_zeros(1, rows.shape[1])])  # the last is what lies outside
        ctx.save_for_backward(rows[:-1], weight, outputs, holes)
        return F.embedding_bag(taps, (rows @ _matrix(weight).t()).view(-1, len(weight)), mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple:
        rows, weight, outputs, holes = ctx.saved_tensors
        of_token = holes.t().to(grad.dtype) @ grad  # (9, N)
        grad = torch.cat([grad, grad.new_zeros(1, grad.shape[1]), of_token])
        grad = grad.index_select(0, outputs).view(len(rows), -1)
        grad_weight = (grad.t() @ rows).view(3, 3, len(weight), -1).permute(2, 3, 0, 1)
        grad_rows = grad @ _matrix(weight)
        return grad_rows[:-1], grad_rows[-1], grad_weight, None, None, None


def _matrix(weight: Tensor) -> Tensor:
    """(N, C, 3, 3) -> (9*N, C); of a channels_last weight, the rows as they lie in memory, in another order."""
    return weight.permute(2, 3, 0, 1).flatten(0, 2)


def _tables(visible: VisiblePatches, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the nine taps of a 3x3 convolution lead, numbered y-major; n = V*b*b visible cells, m = B*H*W in all.

    Returns:
        (m, 9) int32: for each output, its taps' contributions; those of visible cell i are 9*i to 9*i + 8, holes
            count as cell n and what is outside the image as n + 1;
        (n*9 + 9,) int64: for each visible cell, the outputs it adds to, m where outside; the token's numbers follow,
            m + 1 to m + 9;
        (m, 9) bool: which taps are holes.
    """
    (h, w), device = visible.grid, visible.index.device
    n, m, (height, width) = visible.count * b * b, visible.batch * h * w * b * b, (h * b, w * b)
    cells = torch.full((visible.batch * h * w, b, b), n, device=device, dtype=torch.int32)
    numbers = torch.arange(n, device=device, dtype=torch.int32).view(-1, b, b)
    dense = (
        cells.index_copy(0, visible.patches, numbers).view(-1, h, w, b, b).transpose(2, 3).reshape(-1, height, width)
    )
    around = F.pad(dense, (1, 1, 1, 1), value=n + 1).unfold(1, 3, 1).unfold(2, 3, 1).reshape(m, 9)
    taps = around * 9 + torch.arange(9, device=device, dtype=torch.int32)
    places = torch.arange(m, device=device).view(-1, height, width)
    outputs = F.pad(places, (1, 1, 1, 1), value=m).unfold(1, 3, 1).unfold(2, 3, 1).flip(3, 4)
    outputs = outputs.reshape(-1, h, b, w, b * 9).transpose(2, 3).reshape(-1, b * b * 9)
    of_token = torch.arange(m + 1, m + 10, device=device)
    return taps, torch.cat([outputs.index_select(0, visible.patches).flatten(), of_token]), around == n
