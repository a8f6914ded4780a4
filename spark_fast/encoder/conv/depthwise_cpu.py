"""Gradients of a depthwise convolution that are themselves forward convolutions, for the CPU.

oneDNN computes a depthwise convolution near memory speed but its weight gradient 8-60 times slower (7x7, channels
last: 0.7 ms against 7 ms in fp32 and 23 ms in bf16). Both gradients of a convolution are convolutions, so the
fast one serves: the input's gradient is the output's with the kernel turned round, and the weight's gradient is
every image's input convolved with the output's gradient as kernel, images taken as further channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `F.conv2d(x, weight, groups=C)`, without padding or stride.

    Args:
        grad: (N, C, H', W'), of the output.
        x: (N, C, H, W).
        weight: (C, 1, ky, kx).
        wanted: of x, of the weight.

    Returns:
        (N, C, H, W) and (C, 1, ky, kx), None where not wanted.
    """
    n, c, height, width = x.shape
    ky, kx = weight.shape[2:]
    grad_x = grad_weight = None
    if wanted[0]:
        grad_x = F.conv2d(grad, weight.flip(2, 3), None, 1, (ky - 1, kx - 1), 1, c)
    if wanted[1]:
        images = x.permute(2, 3, 0, 1).reshape(1, height, width, n * c).permute(0, 3, 1, 2)  # (1, N*C, H, W)
        kernels = grad.reshape(n * c, 1, *grad.shape[2:])
        each = F.conv2d(images, kernels, None, 1, 0, 1, n * c)  # (1, N*C, ky, kx)
        grad_weight = each.view(n, c, 1, ky, kx).sum(0, dtype=torch.float32).to(weight.dtype)
    return grad_x, grad_weight
