"""What a checkpoint holds of a run: gathered for a save, put back for a resume."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from spark_fast.checkpoint import file as checkpoint
from spark_fast.checkpoint.file import Content, RunContent
from spark_fast.errors import CheckpointError
from spark_fast.pipelines import Pipeline
from spark_fast.run.data_parallel import gather_state
from spark_fast.run.distributed import Ranks
from spark_fast.versions import versions

log = logging.getLogger("spark_fast")


@dataclass
class Position:
    """Where a run is.

    Attributes:
        step: optimiser steps done.
        begun: of them before this process.
        loss: mean of the steps before the last log point.
    """

    steps_per_epoch: int
    epochs: int
    step: int = 0
    begun: int = 0
    loss: float = math.nan

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.steps_per_epoch

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last step done was the last one of an epoch."""
        return self.step % self.steps_per_epoch == 0


@dataclass
class RunState:
    """The parts of a run that a checkpoint holds.

    Attributes:
        settings: as plain dictionaries; a resume compares them.
        extra: what a kind of training adds, as tensors and plain types.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    position: Position
    data: Pipeline
    settings: Mapping[str, object]
    extra: Callable[[], Content] = dict

    def gather(self, keep: bool) -> Content:
        """A copy on the host that the next step does not change; called on all ranks together.

        Args:
            keep: on this rank; others only hand over their share of the optimiser's state and get {}.
        """
        gather_state(self.optimizer)
        if not keep:
            return {}
        measured = {"statistics": self.data.statistics.to_dict()} if self.data.statistics else {}
        return checkpoint.run_state(
            self.model,
            self.optimizer,
            step=self.position.step,
            epoch=self.position.epoch,
            loss=self.position.loss,
            num_samples=self.data.num_samples,
            listing=self.data.listing,
            settings=self.settings,
            versions=versions(),
            random_state=checkpoint.random_state(),
            scaler=self.scaler.state_dict(),
            **measured,
            **self.extra(),
        )

    def restore(self, path: Path, state: RunContent, ranks: Ranks) -> None:
        """Resume from the checkpoint `state`, read from `path`, at the next batch.

        Raises:
            CheckpointError: it is of another model, or the ranks have read different ones.
        """
        checkpoint.restore(path, state, self.model, self.optimizer)
        if state["scaler"]:  # empty from a run in another precision than fp16
            self.scaler.load_state_dict(state["scaler"])
        at = self.position
        at.step = at.begun = state["step"]
        at.loss = state["loss"]
        if len(set(ranks.gather(at.step))) > 1:
            raise CheckpointError(f"{path}: the ranks do not read the same checkpoint; see their messages")
        log.info("resumed from %s at step %d of %d", path, at.step, at.total_steps)

    def size(self, moments: int, copies: int = 1) -> int:
        """About the bytes of a checkpoint.

        Args:
            moments: tensors that the optimiser keeps for each parameter; copies: of the model, 2 with an average of it.
        """
        state = copies * checkpoint.tensor_bytes(self.model.state_dict())
        return state + moments * sum(p.nbytes for p in self.model.parameters())
