"""ConvTranspose2d(4, stride 2, pad 1) and the 3x3 convolution after it, as one linear map.

Nothing stands between the two in a block of the decoder, so together they are one transposed convolution with a 6x6
kernel, stride 2 and padding 2: 9 products per output pixel and channel pair instead of 4 + 9, and the widest tensor
of the network is never stored. Per axis, with z the output, y the tensor between and x the input,

    z[i] = sum_d w[d] y[i + d - 1],   y[j] = sum_n x[n] t[j - 2n + 1]   =>   kernel[r] = sum_d w[d] t[r + d - 2],

the correlation of the two kernels. It is exact but for the outermost ring of pixels: there the 3x3 convolution sees
zeros, while the merged map sees the ring of y just outside the image, as the transposed convolution would continue it.
What that ring adds is computed (a line of pixels on each side) and taken off again.

The merge costs 144 C^2 C' multiplications whatever the batch, the two-step form 4 B H W C C' more than the merged one:
it pays from B H W = 36 C upwards, see `merging_pays`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spark_fast.autograd import AutogradContext, cast_for_autocast
from spark_fast.decoder.gpu_costs import merging_costs

ADVANTAGE = 3  # the saving must be so many times the merge: below, it was measured equal or slower


def merging_pays(x: Tensor, channels: int) -> bool:
    """Whether the merged form is the faster one for an input (B, C, h, w) and `channels` between the two.

    By a constant measured on CPUs, by a model on a GPU (`gpu_costs`).
    """
    if x.is_cuda:
        costs = merging_costs(len(x), x.shape[2], x.shape[3], channels)
        return costs["merged"] < costs["apart"]
    pixels = 4 * len(x) * x.shape[2] * x.shape[3]
    return 4 * pixels >= ADVANTAGE * 144 * channels


def upsample(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.conv_transpose2d(x, weight, bias, stride=2, padding=1), (B, C, h, w) -> (B, M, 2h, 2w).

    On a CPU, where there is more weight than pixels, its gradients are matrix products over the 16 taps: oneDNN's
    transposed convolution then runs at half the speed of one. Elsewhere it is torch's.
    """
    if x.device.type != "cpu" or len(x) * x.shape[2] * x.shape[3] > 2 * x.shape[1]:
        return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
    return _Upsample.apply(*cast_for_autocast(x, weight, bias))


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor, ...]:
        (x, weight), (grad,) = ctx.saved_tensors, grads
        (batch, c, h, w), m = x.shape, weight.shape[1]
        taps = F.pad(grad, (1, 1, 1, 1)).permute(0, 2, 3, 1).unfold(1, 4, 2).unfold(2, 4, 2)  # (B, h, w, M, 4, 4)
        taps = taps.permute(0, 1, 2, 4, 5, 3).reshape(-1, 16 * m)
        grad_x = taps @ weight.permute(0, 2, 3, 1).reshape(c, -1).t()
        grad_weight = x.permute(0, 2, 3, 1).reshape(-1, c).t() @ taps
        return (
            grad_x.view(batch, h, w, c).permute(0, 3, 1, 2),
            grad_weight.view(c, 4, 4, m).permute(0, 3, 1, 2),
            grad.sum((0, 2, 3)),
        )


def upsample_and_convolve(
    x: Tensor, transposed: Tensor, bias: Tensor, weight: Tensor, centred: bool = False
) -> Tensor:  # fmt: skip
    """F.conv2d(F.conv_transpose2d(x, transposed, bias, stride=2, padding=1), weight, padding=1) in one step.

    Args:
        x: (B, C, h, w).
        transposed: (C, M, 4, 4), with `bias` (M,).
        weight: (N, M, 3, 3).
        centred: the layer behind takes the mean over the batch off, as a batch norm in training does. The gradient of
            the whole map then sums to 0 in every channel, and is not summed.

    Returns:
        (B, N, 2h, 2w).
    """
    x, transposed, bias, weight = cast_for_autocast(x, transposed, bias, weight)
    kernel = _Merge.apply(transposed, weight)
    inside = torch.einsum("nmrs,m->n", weight, bias)  # what the bias adds where all nine taps are inside
    z, *lines = _Widen.apply(x, kernel, inside.detach())
    inside = inside.detach() if centred else inside
    return _TakeOffEdges.apply(z, inside, *_ring(lines, transposed, bias, weight))


class _Merge(torch.autograd.Function):
    """(C, M, 4, 4) and (N, M, 3, 3) -> (C, N, 6, 6), F.conv2d(transposed, weight, padding=2).

    The gradient of the second is a matrix product over the nine taps: torch's takes it for one of a convolution over
    images of 4x4, and needs two to six times as long.
    """

    @staticmethod
    def forward(ctx: AutogradContext, transposed: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(transposed, weight)
        return F.conv2d(transposed, weight, padding=2)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (transposed, weight), (grad,) = ctx.saved_tensors, grads
        (n, m), flipped = weight.shape[:2], weight.flip(2, 3).transpose(0, 1)
        taps = grad.permute(0, 2, 3, 1).unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3)  # (C, 4, 4, 3, 3, N)
        grad_weight = taps.reshape(-1, 9 * n).t() @ transposed.permute(0, 2, 3, 1).reshape(-1, m)
        return F.conv2d(grad, flipped), grad_weight.view(3, 3, n, m).flip(0, 1).permute(2, 3, 0, 1)


def _ring(
    lines: list[Tensor], transposed: Tensor, bias: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the continued y adds to the first and last row, (B, N, 2w), and column, (B, N, 2h), of the output.

    `lines` are those of the input. The rows have the corners of the ring, the columns do not.
    """
    sides = list(zip(lines, _Sides.apply(transposed), _Sides.apply(weight), strict=True))
    top, bottom = (F.conv1d(F.conv_transpose1d(line, up, bias, stride=2), over) for line, up, over in sides[:2])
    left, right = (
        F.conv1d(F.conv_transpose1d(line, up, bias, stride=2, padding=1), over, padding=1)
        for line, up, over in sides[2:]
    )
    return top, bottom, left, right


class _Sides(torch.autograd.Function):
    """The taps of the four sides of a kernel, as `_lines`; their gradients are added up in one tensor, not in four."""

    @staticmethod
    def forward(ctx: AutogradContext, kernel: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(kernel)
        return _lines(kernel)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> Tensor:
        (kernel,) = ctx.saved_tensors
        total = torch.zeros_like(kernel)
        for line, grad in zip(_lines(total), grads, strict=True):
            line += grad
        return total


class _Widen(torch.autograd.Function):
    """The 6x6 transposed convolution of (B, C, h, w), and the input's first and last row, first and last column.

    One function, because autograd makes a gradient of full size for each slice, and then adds them up.
    """

    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, kernel: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, kernel)
        z = F.conv_transpose2d(x, kernel, bias, stride=2, padding=2)
        return z, *(line.clone() for line in _lines(x))

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, kernel), (grad, *edges) = ctx.saved_tensors, grads
        grad_x, grad_kernel, _ = torch.ops.aten.convolution_backward(
            grad, x, kernel, None, [2, 2], [2, 2], [1, 1], True, [0, 0], 1, [True, True, False]
        )
        for line, edge in zip(_lines(grad_x), edges, strict=True):
            line += edge
        return grad_x, grad_kernel, None


def _lines(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and last row, first and last column of (B, C, h, w)."""
    return x[:, :, 0], x[:, :, -1], x[..., 0], x[..., -1]


class _TakeOffEdges(torch.autograd.Function):
    """z with four lines subtracted at its edges, in place; passes on the gradient of the bias that z was given.

    Its own function because autograd's answer to writing into a slice copies the whole gradient, once for each, and
    because oneDNN takes ten times as long for the bias of a transposed convolution as a sum does.
    """

    @staticmethod
    def forward(ctx: AutogradContext, z: Tensor, inside: Tensor, *edges: Tensor) -> Tensor:
        for line, edge in zip(_lines(z), edges, strict=True):
            line -= edge
        ctx.mark_dirty(z)
        return z

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        return g, g.sum(dim=(0, 2, 3)) if ctx.needs_input_grad[1] else None, *(-line for line in _lines(g))
