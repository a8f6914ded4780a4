"""A convolution that reads the neighbours of a patch through a table, as an operator: its shapes and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload

from spark_fast.autograd import AutogradContext
from spark_fast.encoder.conv.geometry import Axis
from spark_fast.encoder.conv.kernels.operator import with_gradient


def outputs_like(
    cells: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, y: Sequence[int], x: Sequence[int]
) -> Tensor:
    """Memory for the outputs, (V, b, b, C) and a weight (O, ...) -> (V, b/stride, b/stride, O)."""
    b = cells.shape[1] // Axis(*y).stride
    return cells.new_empty(cells.shape[0], b, b, weight.shape[0])


class _Context(AutogradContext, Protocol):
    y: Sequence[int]
    x: Sequence[int]


def neighbour_operator(convolve: OpOverload, of_cells: OpOverload, of_weight: OpOverload) -> Callable[..., Tensor]:
    """The operator `convolve`, of the arguments and shape of `outputs_like`, as autograd and the compiler know it.

    Args:
        of_cells: its gradient with respect to the cells, (V, b, b, C).
        of_weight: that with respect to the weight, (O, ...), or to weight and bias, (O,); fp32.
    """
    torch.library.register_fake(convolve)(outputs_like)

    def keep(ctx: _Context, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.y, ctx.x = inputs
        ctx.save_for_backward(*tensors)

    def gradients(ctx: _Context, grad: Tensor) -> tuple:
        cells, weight, bias, neighbours = ctx.saved_tensors
        needs_cells, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_cells = of_cells(grad, weight, neighbours, ctx.y, ctx.x) if needs_cells else None
        grad_weight = grad_bias = None
        if needs_weight or needs_bias:
            sums = of_weight(grad, cells, neighbours, ctx.y, ctx.x)
            grad_weight, grad_bias = sums if isinstance(sums, tuple) else (sums, None)
            grad_weight = grad_weight.to(weight.dtype)
        if needs_bias:
            grad_bias = (grad.sum((0, 1, 2), dtype=torch.float32) if grad_bias is None else grad_bias).to(bias.dtype)
        return grad_cells, grad_weight, grad_bias if needs_bias else None, None, None, None

    return with_gradient(convolve, keep, gradients)
