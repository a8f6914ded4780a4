"""The order of a tensor's numbers in memory: through it torch's fused optimisers walk, not through indices.

They take for granted that weights, gradients and moments are laid out alike, and on a CPU compute nonsense where they
are not, without a word: a checkpoint of a run in another layout would do.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def laid_out_as(weights: Tensor, other: Tensor) -> Tensor:
    """`other` with the strides of `weights`, copied where the order differs.

    Strides of dimensions of one element say nothing of memory: a depthwise weight (C, 1, k, k) need not be copied.
    """
    if other.stride() == weights.stride():
        return other
    if all(n == 1 or a == b for n, a, b in zip(other.shape, other.stride(), weights.stride(), strict=True)):
        return other.as_strided(weights.shape, weights.stride())
    return torch.empty_like(weights).copy_(other)


def in_order(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same numbers, on a CPU with indices that run as memory does: channels_last (O, C, ky, kx) as (O, ky, kx, C).

    There torch's kernel first copies what is not contiguous, which takes up to as long as the update.
    """
    return [t if t.is_cuda or t.is_contiguous() or t.dim() != 4 else t.permute(0, 2, 3, 1) for t in tensors]
