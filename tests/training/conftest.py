"""A run small enough to train in a millisecond: one linear layer, four numbers an image."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from spark_fast.pipelines import Batch
from spark_fast.pipelines.base import BadImageCounts
from spark_fast.pipelines.transforms.bands.statistics import Statistics
from spark_fast.run.distributed import Ranks
from spark_fast.training.run_state import Position, RunState


@dataclass
class Numbers:
    """A pipeline of `steps` batches of two images; batch k of epoch e holds the samples (e, k)."""

    steps: int = 3
    num_samples: int = 6
    listing: str = "abc"
    num_classes: int = 0
    classes: list[str] = field(default_factory=list)
    bad_images: BadImageCounts = field(default_factory=BadImageCounts)
    statistics: Statistics | None = None
    opened: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        self.opened.append((epoch, start_step))
        for step in range(start_step, self.steps):
            images = torch.full((2, 4), float(10 * epoch + step))
            yield Batch(images, None, torch.tensor([epoch, step]))

    def close(self) -> None:
        pass


@pytest.fixture
def alone():
    return Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def make_state():
    """make_state(epochs=2): a RunState of a linear layer and SGD with momentum, always from the same weights."""

    def make(epochs: int = 2, **more: object) -> RunState:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        data = Numbers()
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        return RunState(model, optimizer, scaler, Position(len(data), epochs), data, {"run": {"seed": 0}}, **more)

    return make
