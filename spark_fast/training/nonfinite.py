"""A step whose loss or gradient is no finite number leaves no trace, and the host need not wait to know.

One flag on the device decides: the fused optimisers skip their update where it is set (`found_inf`), and the
model's buffers (batch statistics, which a NaN has reached by then) are put back. What was skipped is read at the next
log point.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Guard:
    """Watches the steps of one model.

    Args:
        agree: the largest of a flag over all ranks, on the device; they must all skip or none.
        overflow_is_normal: under fp16 gradients overflow now and then; those steps are skipped, but not counted as bad.
    """

    def __init__(self, model: nn.Module, agree: Callable[[Tensor], Tensor], *, overflow_is_normal: bool) -> None:
        self._buffers = list(model.buffers())
        self._agree, self._overflow_is_normal = agree, overflow_is_normal
        self._before: list[Tensor] = []
        self._bad: list[Tensor] = []  # a flag for each step since the last reading

    def before_step(self) -> None:
        """Remember the buffers."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def judge(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Whether this step is to be skipped, and whether it was bad: () float32 on the device, 1 or 0.

        Where it is skipped, the buffers are put back.
        """
        no_loss, no_norm = ~loss.isfinite(), ~norm.isfinite()
        flags = torch.stack([no_loss | no_norm, no_loss if self._overflow_is_normal else no_loss | no_norm])
        skip, bad = self._agree(flags.float()).unbind()
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(skip > 0, before, buffer))
        return skip, bad

    def note(self, bad: Tensor) -> None:
        """Keep a step's second flag until it is read."""
        self._bad.append(bad)

    def bad_steps(self) -> list[bool]:
        """Which steps since the last call were bad, in order. Synchronises host and device."""
        bad = torch.stack(self._bad).bool().tolist() if self._bad else []
        self._bad.clear()
        return bad
