"""The norms of many tensors, by all threads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor, (n,) for n of them, on their device.

    torch takes the norm of a whole tensor in one thread on a CPU, and those of its rows in all: so rows come first.
    """
    if not tensors[0].is_cuda:
        rows = [tuple(range(1, t.dim())) for t in tensors]
        tensors = [torch.linalg.vector_norm(t, dim=d) if d else t for t, d in zip(tensors, rows, strict=True)]
    return torch.stack(torch._foreach_norm(list(tensors)))
