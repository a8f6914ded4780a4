"""Accuracy from a confusion matrix: each image counts once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spark_fast.evaluation.data import Labelled
from spark_fast.run.distributed import Ranks


class Confusion(NamedTuple):
    """A sparse confusion matrix: a dense one of 21,841 classes takes gigabytes.

    Attributes:
        classes: how many there are.
        rows: (R, 3) int64: true class, predicted class, number of images. Sorted, each pair once.
    """

    classes: int
    rows: Tensor

    @classmethod
    def of_matrix(cls, matrix: Tensor) -> Confusion:
        """From a (classes, guesses) matrix, which older checkpoints of fine-tuning hold."""
        pairs = matrix.nonzero()
        return cls(len(matrix), torch.cat([pairs, matrix[pairs[:, 0], pairs[:, 1], None]], dim=1))

    @property
    def images(self) -> Tensor:
        """(classes,) int64, of each class."""
        return self._sums(self.rows)

    @property
    def right(self) -> Tensor:
        """(classes,) int64, the images classified correctly."""
        return self._sums(self.rows[self.rows[:, 0] == self.rows[:, 1]])

    def matrix(self, side: int) -> Tensor:
        """(side, side) int64 counts; a cell sums classes / side neighbouring classes."""
        cells = self.rows[:, :2] * side // self.classes
        counts = torch.zeros(side * side, dtype=torch.int64)
        return counts.index_add_(0, cells[:, 0] * side + cells[:, 1], self.rows[:, 2]).view(side, side)

    def _sums(self, rows: Tensor) -> Tensor:
        return torch.zeros(self.classes, dtype=torch.int64).index_add_(0, rows[:, 0], rows[:, 2])


class Scores:
    """Counts over images; ranks count their own and are summed at the end."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.classes = classes
        self.taken: list[Tensor] = []  # of each batch, on the device: true class * classes + guess
        self.in_top5 = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count images by their (B, classes) scores and (B,) labels; nothing is read back from the device."""
        best = scores.topk(min(5, self.classes), dim=1).indices  # (B, 5)
        self.taken.append(labels * self.classes + best[:, 0])
        self.in_top5 += (best == labels[:, None]).sum()

    def reduce(self, ranks: Ranks) -> Scores:
        """With the counts of all ranks."""
        own = torch.cat([*self.taken, torch.zeros(0, dtype=torch.int64, device=self.in_top5.device)]).cpu()
        self.taken, self.in_top5 = ranks.gather(own), ranks.sum(self.in_top5)
        return self

    @property
    def confusion(self) -> Confusion:
        """Of the images counted, on the host."""
        taken = torch.cat([part.cpu() for part in self.taken])
        found, counts = taken.unique(return_counts=True)
        return Confusion(self.classes, torch.stack([found // self.classes, found % self.classes, counts], dim=1))

    def accuracy(self) -> dict[str, float]:
        """`top1` and `top5` in percent, and `images`, their number."""
        confusion = self.confusion
        images, right = int(confusion.images.sum()), int(confusion.right.sum())
        return {"top1": 100 * right / images, "top5": 100 * int(self.in_top5) / images, "images": images}


@torch.no_grad()
def judge(classify: Callable[[Tensor], Tensor], data: Labelled, ranks: Ranks) -> Scores:
    """Scores of a classifier, images (B, C, H, W) -> (B, classes), over the images of all ranks, each once."""
    scores = Scores(data.num_classes, ranks.device)
    for images, labels in data.epoch():
        scores.add(classify(images).float(), labels)
    return scores.reduce(ranks)
