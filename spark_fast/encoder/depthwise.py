"""Depthwise convolution whose two gradients are themselves forward convolutions, for the CPU.

oneDNN computes a depthwise convolution near memory speed but its weight gradient 8-60 times slower (7x7, channels
last: 0.7 ms against 7 ms in fp32 and 23 ms in bf16). Both gradients of a convolution are convolutions, so the
fast one serves: the input's gradient is the output's with the kernel turned round, and the weight's gradient is
every image's input convolved with the output's gradient as kernel, images taken as further channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """(N, C, H, W) * (C, 1, k, k) -> (N, C, H', W'), as `F.conv2d(..., groups=C)`.

    Where the trick does not pay or apply (GPU, strides, float64) it is exactly that call.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if x.device.type != "cpu" or stride != 1 or x.dtype == torch.float64:
        return F.conv2d(x, weight, bias, stride, padding, 1, weight.shape[0])
    return _Depthwise.apply(x, weight, bias, padding)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        return F.conv2d(x, weight, bias, 1, padding, 1, weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, ctx.padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        (n, c, height, width), k, p = x.shape, weight.shape[2], ctx.padding
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = F.conv2d(grad, weight.flip(2, 3), None, 1, k - 1 - p, 1, c)
        if ctx.needs_input_grad[1]:
            images = x.permute(2, 3, 0, 1).reshape(1, height, width, n * c).permute(0, 3, 1, 2)  # (1, N*C, H, W)
            kernels = grad.reshape(n * c, 1, *grad.shape[2:])
            each = F.conv2d(images, kernels, None, 1, p, 1, n * c)  # (1, N*C, k, k)
            grad_weight = each.view(n, c, 1, k, k).sum(0, dtype=torch.float32).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None
