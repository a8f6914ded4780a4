"""What the ranks tell each other within a step, by their default group; the host does not wait for a device."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

# torch 2.14 renamed it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def count_ranks() -> int:
    """How many there are: 1 where `torch.distributed` has not begun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(own: Tensor) -> Tensor:
    """Those of all ranks, (R, *own.shape), of a tensor of any shape; shape and dtype are the same on all."""
    every = own.new_empty(dist.get_world_size(), *own.shape)
    _all_gather(every.flatten(0, 1), own.contiguous())
    return every


def mean_over_ranks(own: Tensor) -> Tensor:
    """The mean over the ranks of a tensor of any shape, which is the same on all of them; `own` keeps its values."""
    mean = own / dist.get_world_size()
    dist.all_reduce(mean)
    return mean
