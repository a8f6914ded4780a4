"""torch's SGD, safe against gradients and momentum in another memory format than the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from spark_fast.training.optimizers.layout import laid_out_as


class SGD(torch.optim.SGD):
    """torch.optim.SGD."""

    def _init_group(self, group: dict, params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None]) -> bool:
        """torch's own, which collects what the kernel gets; then all of it is laid out alike (`layout`)."""
        has_sparse = super()._init_group(group, params, grads, buffers)
        for i, (p, buffer) in enumerate(zip(params, buffers, strict=True)):
            grads[i] = laid_out_as(p, grads[i])
            buffers[i] = None if buffer is None else laid_out_as(p, buffer)
        return has_sparse
