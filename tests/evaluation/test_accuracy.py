"""Counting what was right."""

import json

import torch

from spark_fast.evaluation.accuracy import Confusion, Scores
from spark_fast.evaluation.report import Report

CPU = torch.device("cpu")


def test_scores_count():
    scores = Scores(6, CPU)
    logits = torch.eye(6)[[0, 1, 1, 5]]
    logits[3, :5] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    logits[2, 2] = 0.5
    scores.add(logits, torch.tensor([0, 1, 2, 0]))
    found = scores.accuracy()
    assert (found["top1"], found["images"]) == (50, 4)
    confusion = scores.confusion
    assert confusion.rows.tolist() == [[0, 0, 1], [0, 5, 1], [1, 1, 1], [2, 1, 1]]
    assert (confusion.images.tolist(), confusion.right.tolist()) == ([2, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0])
    assert confusion.matrix(3).tolist() == [[2, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert found["top5"] == 75, "class 0 is the sixth of the last image"


def test_a_matrix_of_an_earlier_checkpoint_is_the_same():
    scores = Scores(4, CPU)
    scores.add(torch.eye(4)[[0, 1, 1, 3, 3]], torch.tensor([0, 1, 1, 2, 3]))
    assert Confusion.of_matrix(scores.confusion.matrix(4)).rows.tolist() == scores.confusion.rows.tolist()


def test_nothing_grows_with_the_square_of_the_classes(tmp_path):
    """21,841 classes squared are 3.8 GB of counts."""
    classes = 21_841
    scores, labels = Scores(classes, CPU), torch.arange(0, classes, 400)
    logits = torch.zeros(len(labels), classes)
    logits[torch.arange(len(labels)), labels] = 1.0
    scores.add(logits, labels)
    report = Report(tmp_path)
    report.result(scores.confusion, [], **scores.accuracy())
    report.close()
    assert scores.confusion.rows.numel() == 3 * len(labels)
    assert json.loads((tmp_path / "result.json").read_text())["accuracy_of_class"][::400] == [100.0] * len(labels)
