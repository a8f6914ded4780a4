"""What the autograd functions of this project share: the type of their `ctx`, and the casts of autocast."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class AutogradContext(Protocol):
    """`ctx` of a `torch.autograd.Function`, which torch leaves untyped; a function that keeps more extends it."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for the backward pass."""

    def mark_dirty(self, *tensors: Tensor) -> None:
        """Say which inputs the forward pass changed in place."""


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast would hand them to a convolution: it does not know functions of our own."""
    device = tensors[0].device.type
    if tensors[0].is_meta or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)
