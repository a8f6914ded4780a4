"""Data parallelism over the ranks: how gradients are averaged, and who keeps the optimiser's state."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from spark_fast.run.distributed import Ranks


def data_parallel(model: nn.Module, ranks: Ranks, *, static: bool, gradients_in_bf16: bool) -> nn.Module:
    """The model with its gradients averaged over the ranks, in buckets while backward goes on; alone, itself.

    Args:
        static: every step does the same, so that buckets can be ordered by the first one; not with accumulation.
        gradients_in_bf16: exchange half the bytes; the average is then of rounded gradients.
    """
    if ranks.world_size == 1:
        return model
    give_gradients_strides_of_weights(model)
    with warnings.catch_warnings():
        # deprecated in torch 2.14, but torch 2.11 has no other name for it
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = DistributedDataParallel(
            model,
            device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
            broadcast_buffers=False,  # as published: statistics are synchronised or each rank's own
            gradient_as_bucket_view=True,
            static_graph=static,
        )
    if gradients_in_bf16:
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def give_gradients_strides_of_weights(model: nn.Module) -> None:
    """Have each gradient arrive with the strides of its weight, which is how DDP's buckets hold it.

    Where a dimension is 1 (weights of 1x1 and depthwise convolutions) contiguous and channels_last are the same
    memory, and its stride says nothing. The weight got that of one layout, the kernels may give its gradient that of
    the other, and DDP would take it for another layout and warn.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() == 4 and parameter.is_contiguous():
            parameter.register_hook(partial(_with_strides, parameter.stride()))


def _with_strides(strides: tuple[int, ...], gradient: Tensor) -> Tensor:
    same = gradient.stride() == strides or not gradient.is_contiguous()
    return gradient if same else gradient.as_strided(gradient.shape, strides)


def gather_state(optimizer: torch.optim.Optimizer) -> None:
    """Bring the whole state to the first rank, before `state_dict` there; all ranks together."""
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict(to=0)


def share_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Average the running statistics of all ranks, so that all ranks evaluate with the same ones."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(ranks.mean(buffer))
