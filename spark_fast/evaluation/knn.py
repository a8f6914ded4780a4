"""k-NN on frozen features, by DINO's protocol (Caron et al., ICCV 2021; eval_knn.py of its code).

The k training images with the largest cosine similarity vote, each with weight exp(similarity / temperature). The bank
of training features stays where it was made: each rank finds the nearest of all queries in its own part, and the
candidates are merged, so the result is that of one rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from spark_fast.evaluation.accuracy import Scores
from spark_fast.run.distributed import Ranks

CHUNK = 1024  # queries compared with a bank at a time


def nearest(
    queries: Tensor, bank: Tensor, labels: Tensor, k: int, alive: Callable[[int], None] = lambda step: None
) -> tuple[Tensor, Tensor]:
    """The k images of a bank that are most similar to each query; fewer where the bank holds fewer.

    Args:
        queries: (Q, C); bank: (N, C), both normalised; labels: (N,).
        alive: called before each CHUNK of queries with its number.

    Returns:
        (Q, k) similarities and (Q, k) labels, the most similar first.
    """
    found = []
    for number, chunk in enumerate(queries.split(CHUNK)):
        alive(number)
        found.append((chunk @ bank.T).topk(min(k, len(bank)), dim=1))
    return torch.cat([f.values for f in found]), labels[torch.cat([f.indices for f in found])]


def votes(similarities: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """(Q, k) and (Q, k) -> (Q, classes), the weight of each class."""
    weights = (similarities / temperature).exp()
    return weights.new_zeros(len(labels), classes).scatter_add_(1, labels, weights)


def classify_by_neighbours(
    bank: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    *,
    k: int,
    temperature: float,
    classes: int,
    ranks: Ranks,
    alive: Callable[[int], None] = lambda step: None,
) -> Scores:
    """Scores of the queries of all ranks.

    Args:
        bank: features (N, C) and labels (N,) of this rank's training images.
        queries: features (Q, C) and labels (Q,) of this rank's share of the images to classify.
        alive: see `nearest`; called equally often on all ranks.
    """
    asked = _of_all_ranks(queries, ranks)
    features, labels = (part.to(ranks.device) for part in bank)
    wanted = normalize(asked[0].to(ranks.device), dim=1)
    known = normalize(features, dim=1) if len(features) else wanted[:0]  # a rank may have no image
    found = tuple(t.cpu() for t in nearest(wanted, known, labels, k, alive))
    similarities, neighbours = (torch.cat(column, dim=1) for column in zip(*ranks.gather(found), strict=True))
    best = similarities.topk(k, dim=1)
    scores = Scores(classes, torch.device("cpu"))
    for similar, voters, truth in zip(
        best.values.split(CHUNK), neighbours.gather(1, best.indices).split(CHUNK), asked[1].split(CHUNK), strict=True
    ):
        scores.add(votes(similar, voters, classes, temperature), truth)
    return scores  # the same on every rank


def _of_all_ranks(rows: tuple[Tensor, Tensor], ranks: Ranks) -> tuple[Tensor, Tensor]:
    shares = [share for share in ranks.gather(tuple(row.cpu() for row in rows)) if len(share[1])]
    features, labels = zip(*shares, strict=True)
    return torch.cat(features), torch.cat(labels)
