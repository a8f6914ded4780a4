"""The type of `ctx` in the autograd functions of this project, and the casts that autocast does not make for them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class AutogradContext(Protocol):
    """`ctx` of a `torch.autograd.Function`, which torch leaves untyped; a function that keeps more extends it."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors, of any shape, for the backward pass."""

    def mark_dirty(self, *tensors: Tensor) -> None:
        """Say which inputs, of any shape, the forward pass changed in place."""


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, of any shape, cast as autocast would for a convolution: it casts nothing for custom functions.

    It leaves float64 as it is.
    """
    device = tensors[0].device.type
    if tensors[0].is_meta or tensors[0].dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)
