"""Nearest neighbours against DINO's formula."""

import torch

from spark_fast.evaluation.knn import nearest, votes


def test_votes_are_dinos():
    queries, bank = torch.eye(3)[:2], torch.eye(3)[[0, 0, 1, 2]]
    _, labels = nearest(queries, bank, torch.tensor([4, 4, 1, 0]), 2)
    assert labels[0].tolist() == [4, 4]
    found = votes(torch.tensor([[1.0, 0.5]]), torch.tensor([[2, 0]]), 3, 0.5)
    torch.testing.assert_close(found, torch.tensor([[2.718282, 0.0, 7.389056]]))
    assert nearest(queries, bank, torch.arange(4), 9)[0].shape == (2, 4)
