"""Functions as operators of `torch.library`, at the least cost of a call.

`torch.library.custom_op` puts five Python functions around each call; a step of ResNet-50 makes 300 of them. What it
would check is checked by `torch.library.opcheck` in the tests. A gradient is a `torch.autograd.Function` around the
operator, which costs a quarter of one that is registered with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def operator(schema: str) -> Callable[[Callable], Callable]:
    """Make a function the operator `spark_fast::<its name>`, on a CPU (by Triton's interpreter) and on CUDA.

    Args:
        schema: of arguments and results, as `torch.library.define` takes it. A function that changes its arguments says
            so to autograd by itself (`torch.autograd.graph.increment_version`).
    """

    def register(function: Callable) -> Callable:
        name = f"spark_fast::{function.__name__}"
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, ("cpu", "cuda"), function)
        return getattr(torch.ops.spark_fast, function.__name__).default

    return register
