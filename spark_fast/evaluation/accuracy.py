"""Accuracy: what was taken for what, counted once for every image, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spark_fast.evaluation.data import Labelled
from spark_fast.run.distributed import Ranks


class Scores:
    """Counts over images; ranks count their own and are summed at the end."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.classes = classes
        self.confusion = torch.zeros(
            classes * classes, dtype=torch.int64, device=device
        )  # true class * classes + guess
        self.in_top5 = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count images by their (B, classes) scores and (B,) labels; nothing is read back from the device."""
        best = scores.topk(min(5, self.classes), dim=1).indices  # (B, 5)
        self.confusion += torch.bincount(labels * self.classes + best[:, 0], minlength=self.classes**2)
        self.in_top5 += (best == labels[:, None]).sum()

    def reduce(self, ranks: Ranks) -> Scores:
        """With the counts of all ranks."""
        self.confusion, self.in_top5 = ranks.sum(self.confusion), ranks.sum(self.in_top5)
        return self

    @property
    def matrix(self) -> Tensor:
        """(true classes, guesses), int64 on the host."""
        return self.confusion.view(self.classes, self.classes).cpu()

    def accuracy(self) -> dict[str, float]:
        """`top1` and `top5` in percent, and `images`, how many they are of."""
        images = int(self.confusion.sum())
        right = int(self.matrix.diagonal().sum())
        return {"top1": 100 * right / images, "top5": 100 * int(self.in_top5) / images, "images": images}


@torch.no_grad()
def judge(classify: Callable[[Tensor], Tensor], data: Labelled, ranks: Ranks) -> Scores:
    """Scores of a classifier, images (B, 3, H, W) -> (B, classes), over the images of all ranks, each once."""
    scores = Scores(data.num_classes, ranks.device)
    for images, labels in data.epoch():
        scores.add(classify(images).float(), labels)
    return scores.reduce(ranks)
