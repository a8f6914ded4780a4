"""Functions as operators of `torch.library`, at the least cost of a call.

`torch.library.custom_op` puts five Python functions around each call; a step of ResNet-50 makes 300 of them. What it
would check is checked by `torch.library.opcheck` in the tests. A gradient is a `torch.autograd.Function` around the
operator, which costs a quarter of one that is registered with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable

from spark_fast.autograd import AutogradContext


def operator(schema: str) -> Callable[[Callable], OpOverload]:
    """Make a function the operator `spark_fast::<its name>`, on a CPU (by Triton's interpreter) and on CUDA.

    Args:
        schema: of arguments and results, as `torch.library.define` takes it. A function that changes its arguments says
            so to autograd by itself (`torch.autograd.graph.increment_version`).
    """

    def register(function: Callable) -> OpOverload:
        name = f"spark_fast::{function.__name__}"
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, ("cpu", "cuda"), function)
        return getattr(torch.ops.spark_fast, function.__name__).default

    return register


def with_gradient(
    forward: OpOverload, keep: Callable[..., None], gradient: Callable[..., tuple]
) -> Callable[..., Tensor]:
    """An operator that autograd knows, on tensors of any shape; it takes its arguments by position.

    Args:
        keep: called with the context, the arguments and the result, saves what `gradient` needs.
        gradient: called with the context and the gradient of the result; gives that of each argument, or None.
    """

    class WithGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: AutogradContext, *arguments: object) -> Tensor:
            output = forward(*arguments)
            keep(ctx, arguments, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: AutogradContext, grad: Tensor) -> tuple:
            return gradient(ctx, grad)

    return WithGradient.apply
