"""What the host makes of steps that the guard skipped: a count, the samples that were in them, and an end to it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from torch import Tensor

from spark_fast.run.distributed import Ranks
from spark_fast.training.nonfinite import Guard

log = logging.getLogger("spark_fast")

DUMP = "bad_steps.jsonl"  # in the run folder: a line for each


class NotFiniteError(Exception):
    """Loss or gradient were no finite numbers for too many steps in a row."""


class BadSteps:
    """Call `add` after every step and `report` where the host may wait for the device.

    Args:
        limit: bad steps in a row that end the run.
    """

    def __init__(self, guard: Guard, ranks: Ranks, limit: int) -> None:
        self._guard, self._ranks, self._limit = guard, ranks, limit
        self._ids: list[Tensor] = []
        self.in_a_row = self.count = 0  # until the last report, in this process

    def add(self, ids: Tensor) -> None:
        """The ids, (B,) on the host, of the samples of one step of this rank."""
        self._ids.append(ids)

    def report(self, step: int, folder: Path | None) -> None:
        """Warn of the bad steps since the last report, on all ranks together; `step` steps of the run are done.

        Raises NotFiniteError after `limit` of them in a row.
        """
        ids, self._ids = self._ids, []
        for number, bad in enumerate(self._guard.bad_steps(), step - len(ids) + 1):
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if bad:
                self.count += 1
                self._tell(number, ids[number - (step - len(ids) + 1)], folder)
            if self.in_a_row >= self._limit:
                raise NotFiniteError(
                    f"loss or gradient were not finite in {self._limit} steps in a row, the last one step {number}; "
                    f"their samples are listed above. The weights are those before these steps, the last checkpoint is "
                    f"kept: look at the samples, or resume with a lower --base_lr"
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
            with (folder / DUMP).open("a") as dump:
                dump.write(json.dumps({"step": step, "samples": samples}) + "\n")
        except OSError as error:
            log.warning("they could not be written there: %s", error)
