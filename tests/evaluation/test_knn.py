"""Nearest neighbours against DINO's formula."""

import torch

from spark_fast.evaluation.knn import classify_by_neighbours, nearest, votes


def test_votes_are_dinos():
    queries, bank = torch.eye(3)[:2], torch.eye(3)[[0, 0, 1, 2]]
    _, labels = nearest(queries, bank, torch.tensor([4, 4, 1, 0]), 2)
    assert labels[0].tolist() == [4, 4]
    found = votes(torch.tensor([[1.0, 0.5]]), torch.tensor([[2, 0]]), 3, 0.5)
    torch.testing.assert_close(found, torch.tensor([[2.718282, 0.0, 7.389056]]))
    assert nearest(queries, bank, torch.arange(4), 9)[0].shape == (2, 4)


def test_it_is_asked_to_go_on_before_each_part_of_the_queries_also_where_there_is_nothing_to_find(monkeypatch):
    monkeypatch.setattr("spark_fast.evaluation.knn.CHUNK", 2)
    asked = []
    similarities, labels = nearest(torch.eye(5), torch.empty(0, 5), torch.empty(0, dtype=torch.int64), 3, asked.append)
    assert asked == [0, 1, 2]
    assert similarities.shape == labels.shape == (5, 0)


def test_a_rank_without_images_to_learn_from_changes_nothing():
    """As the first of two ranks; the other has found one neighbour for each query."""

    class Two:
        device = torch.device("cpu")

        def gather(self, value):
            other = (torch.ones(2, 1), torch.tensor([[0], [1]]))
            return [
                value,
                other if value[0].shape == (2, 0) else (torch.empty(0, 0), torch.empty(0, dtype=torch.int64)),
            ]

    empty = torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
    queries = torch.eye(2), torch.tensor([0, 0])
    scores = classify_by_neighbours(empty, queries, k=1, temperature=0.07, classes=2, ranks=Two())
    assert scores.accuracy()["top1"] == 50
