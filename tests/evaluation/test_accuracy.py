"""Counting what was right."""

import torch

from spark_fast.evaluation.accuracy import Scores

CPU = torch.device("cpu")


def test_scores_count():
    scores = Scores(6, CPU)
    logits = torch.eye(6)[[0, 1, 1, 5]]
    logits[3, :5] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    logits[2, 2] = 0.5
    scores.add(logits, torch.tensor([0, 1, 2, 0]))
    found = scores.accuracy()
    assert (found["top1"], found["images"]) == (50, 4)
    assert scores.matrix[2, 1] == scores.matrix[0, 5] == 1
    assert found["top5"] == 75, "class 0 is the sixth of the last image"
