"""Grouped convolutions in float64 as batched matrix products, for the checks of `verify`.

On the CPU PyTorch computes them one group after the other, 0.2 ms each: a check of an EfficientNet would take 20 s
instead of 3. A dispatch mode replaces them while the checks run, forward and backward, for the network and its
packed form alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
Size = tuple[int, ...]  # (y, x)


class FastGroups(TorchDispatchMode):
    """While active, float64 convolutions of more than one group run as batched matrix products."""

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        """Compute `aten.convolution` and its backward here where they have groups."""
        if func is aten.convolution.default and args[0].dtype == torch.float64:
            x, weight, bias, stride, padding, dilation, transposed, _, groups = args
            if groups > 1 and not transposed:
                return _forward(x, weight, bias, stride, padding, dilation, groups)
        if func is aten.convolution_backward.default and args[0].dtype == torch.float64:
            grad, x, weight, _, stride, padding, dilation, transposed, _, groups, wanted = args
            if groups > 1 and not transposed:
                return _backward(grad, x, weight, stride, padding, dilation, groups, wanted)
        return func(*args, **(kwargs or {}))


def _columns(x: Tensor, kernel: Size, stride: Size, padding: Size, dilation: Size, groups: int) -> Tensor:
    """The inputs of each output cell: (N, C, H, W) -> (G, N*H'*W', C/G*ky*kx)."""
    n = len(x)
    unfolded = F.unfold(x, kernel, dilation, padding, stride)  # (N, C*ky*kx, P)
    each = unfolded.view(n, groups, -1, unfolded.shape[2]).permute(1, 0, 3, 2)
    return each.reshape(groups, -1, each.shape[3])


def _size(x: Tensor, kernel: Size, stride: Size, padding: Size, dilation: Size) -> tuple[int, int]:
    h, w = ((x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
    return h, w


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Size, padding: Size, dilation: Size, groups: int
) -> Tensor:
    kernel, n = weight.shape[2:], len(x)
    columns = _columns(x, kernel, stride, padding, dilation, groups)
    out = columns @ weight.reshape(groups, len(weight) // groups, -1).transpose(1, 2)  # (G, N*P, O/G)
    h, w = _size(x, kernel, stride, padding, dilation)
    out = out.view(groups, n, h, w, -1).permute(1, 0, 4, 2, 3).reshape(n, len(weight), h, w)
    return out if bias is None else out + bias[:, None, None]


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Size,
    padding: Size,
    dilation: Size,
    groups: int,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    kernel, (n, o) = weight.shape[2:], grad.shape[:2]
    rows = grad.reshape(n, groups, o // groups, -1).permute(1, 0, 3, 2).reshape(groups, -1, o // groups)
    grad_x = grad_weight = None
    if wanted[0]:
        columns = rows @ weight.reshape(groups, o // groups, -1)  # (G, N*P, C/G*k*k)
        columns = columns.view(groups, n, -1, columns.shape[2]).transpose(0, 1).transpose(2, 3)  # (N, G, C/G*k*k, P)
        columns = columns.reshape(n, -1, columns.shape[3])
        grad_x = F.fold(columns, x.shape[2:], kernel, dilation, padding, stride)
    if wanted[1]:
        columns = _columns(x, kernel, stride, padding, dilation, groups)
        grad_weight = (rows.transpose(1, 2) @ columns).reshape(weight.shape)
    return grad_x, grad_weight, grad.sum((0, 2, 3)) if wanted[2] else None
