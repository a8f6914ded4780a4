"""Skip non-finite steps on the device, without a host sync.

One flag on the device decides: the fused optimisers skip their update where it is set (`found_inf`), and the
model's buffers (batch statistics, which a NaN has reached by then) are put back. What was skipped is read at the next
log point.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from spark_fast.errors import NotFiniteError
from spark_fast.run.distributed import Ranks

log = logging.getLogger("spark_fast")


class NonfiniteGuard:
    """Watches the steps of one model.

    Args:
        agree: the maximum of (2,) flags over all ranks, on the device: either all ranks skip a step or none.
        overflow_is_normal: in fp16, gradients overflow now and then; such steps are skipped, but not counted as bad.
    """

    def __init__(self, model: nn.Module, agree: Callable[[Tensor], Tensor], *, overflow_is_normal: bool) -> None:
        kinds = groupby(sorted(model.buffers(), key=_kind), _kind)
        self._buffers = [list(buffers) for _, buffers in kinds]  # of one dtype and device each
        self._agree, self._overflow_is_normal = agree, overflow_is_normal
        self._before: list[Tensor] = []  # one flat tensor for each of these lists
        self._bad: list[Tensor] = []  # a flag for each step since the last reading

    def before_step(self) -> None:
        """Copy the buffers, for `judge` to put back."""
        self._before = [_flat(buffers) for buffers in self._buffers]

    def judge(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Whether to skip this step, and whether it was bad: two scalars, float32 on the device, 1 or 0.

        `loss` and `norm` are scalars. Where the step is skipped, the buffers are put back.
        """
        no_loss, no_norm = ~loss.isfinite(), ~norm.isfinite()
        flags = torch.stack([no_loss | no_norm, no_loss if self._overflow_is_normal else no_loss | no_norm])
        skip, bad = self._agree(flags.float()).unbind()
        for buffers, before in zip(self._buffers, self._before, strict=True):
            after = torch.where(skip > 0, before, _flat(buffers)).split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [new.view(old.shape) for new, old in zip(after, buffers, strict=True)])
        return skip, bad

    def note(self, bad: Tensor) -> None:
        """Keep the second flag of `judge`, a scalar, until `bad_steps` reads it."""
        self._bad.append(bad)

    def bad_steps(self) -> list[bool]:
        """Which steps since the last call were bad, in order. Synchronises host and device."""
        bad = torch.stack(self._bad).bool().tolist() if self._bad else []
        self._bad.clear()
        return bad


def _kind(buffer: Tensor) -> tuple[str, str]:
    return str(buffer.dtype), str(buffer.device)


def _flat(buffers: Sequence[Tensor]) -> Tensor:
    """The values of tensors of one dtype, (n,): one kernel launch for a hundred tensors, where copies take one each."""
    return torch.cat([buffer.flatten() for buffer in buffers])


DUMP = "bad_steps.jsonl"  # in the run folder: a line for each


class NonfiniteReport:
    """Call `add` after every step and `report` where the host may wait for the device.

    Args:
        limit: bad steps in a row that end the run.
    """

    def __init__(self, guard: NonfiniteGuard, ranks: Ranks, limit: int) -> None:
        self._guard, self._ranks, self._limit = guard, ranks, limit
        self._ids: list[Tensor] = []
        self.in_a_row = self.count = 0  # until the last report, in this process

    def add(self, ids: Tensor) -> None:
        """One step is done: the ids of this rank's samples, (B,) on the host."""
        self._ids.append(ids)

    def report(self, step: int, folder: Path | None) -> None:
        """Warn of the bad steps since the last report; `step` steps of the run are done. All ranks call it together.

        Raises NotFiniteError after `limit` bad steps in a row.
        """
        ids, self._ids = self._ids, []
        for number, bad in enumerate(self._guard.bad_steps(), step - len(ids) + 1):
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if bad:
                self.count += 1
                self._tell(number, ids[number - (step - len(ids) + 1)], folder)
            if self.in_a_row >= self._limit:
                from spark_fast.checkpoint.manager import published  # a step without a folder needs no safetensors

                kept = "; the last checkpoint is kept" if folder is not None and published(folder) else ""
                raise NotFiniteError(
                    f"loss or gradient were not finite in {self._limit} steps in a row, the last one step {number}; "
                    f"their samples are listed above. The weights are those before these steps{kept}: look at the "
                    f"samples, or {'resume with a' if kept else 'begin with a'} lower --base_lr"
                )

    def _tell(self, step: int, ids: Tensor, folder: Path | None) -> None:
        samples = [sample for rank in self._ranks.gather(ids.tolist()) for sample in rank]
        if folder is None:
            return
        log.warning(
            "loss or gradient were not finite at step %d: it was skipped (%d so far). Its samples are in %s: %s",
            step, self.count, folder / DUMP, ", ".join(map(str, samples[:64])) + (" ..." if samples[64:] else ""),
        )  # fmt: skip
        try:
            with (folder / DUMP).open("a", encoding="utf-8") as dump:
                dump.write(json.dumps({"step": step, "samples": samples}) + "\n")
        except OSError as error:
            log.warning("they could not be written there: %s", error)
