"""Nearest neighbours among embeddings, exactly and a block at a time, and what their labels say of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

METRICS = ("cosine", "euclidean")
TEMPERATURE = 0.07
"""Of the votes, as in "Unsupervised feature learning via non-parametric instance discrimination" (arXiv 1805.01978) and most
figures since."""

Blocks = Callable[[], Iterable[torch.Tensor]]
"""Gives the rows (b, D) from the first to the last, anew at each call."""


class Neighbours(NamedTuple):
    """Of each query, the best first."""

    scores: torch.Tensor
    """(Q, k), in descending order: cosines, or negative distances."""
    rows: torch.Tensor
    """int64 (Q, k)."""


def nearest(
    queries: torch.Tensor, bank: Blocks, k: int, metric: str = "cosine", own: torch.Tensor | None = None
) -> Neighbours:
    """The k rows of the bank that are nearest to each query; every row is compared, and no more than a block of scores is held.

    Cosines are worked out in float32 and distances in float64, where |q − b|² = |q|² − 2 q·b + |b|² loses too much in less.
    Rows that are equally near come in any order.

    Args:
        queries: (Q, D), on the device that computes.
        bank: in blocks, which may lie elsewhere; at least k rows, one more with `own`.
        k: ≥ 1.
        metric: one of METRICS.
        own: int64 (Q,): a row of the bank that each query is itself, and which is left out; −1: none.
    """
    queries = _ready(queries, metric)
    scores = torch.empty(len(queries), 0, dtype=queries.dtype, device=queries.device)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    start = 0
    for block in bank():
        found = _scores(queries, _ready(block.to(queries.device), metric), metric)  # (Q, b)
        numbers = torch.arange(start, start + len(block), device=queries.device)
        if own is not None:
            found.masked_fill_(own.to(queries.device)[:, None] == numbers, -torch.inf)
        scores, rows = torch.cat([scores, found], dim=1), torch.cat([rows, numbers.expand(len(queries), -1)], dim=1)
        scores, best = scores.topk(min(k, scores.shape[1]), dim=1)
        rows = rows.gather(1, best)
        start += len(block)
    assert start >= k + (own is not None), f"{k} neighbours among {start} rows"
    return Neighbours(scores if metric == "cosine" else -(-scores).clamp_(min=0).sqrt_(), rows)


def _ready(rows: torch.Tensor, metric: str) -> torch.Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=1) if metric == "cosine" else rows.double()


def _scores(queries: torch.Tensor, block: torch.Tensor, metric: str) -> torch.Tensor:
    """(Q, b): cosines, or negative squared distances."""
    products = queries @ block.T
    if metric == "cosine":
        return products
    return products.mul_(2).sub_(queries.square().sum(dim=1, keepdim=True)).sub_(block.square().sum(dim=1))


def vote(neighbours: Neighbours, labels: torch.Tensor, k: int) -> torch.Tensor:
    """The class, int64 (Q,), that the first k neighbours give each query: a neighbour with cosine s votes for its label with
    weight exp(s / 0.07); of equal sums the smaller class number wins.

    Args:
        neighbours: by cosine, at least k.
        labels: int64 (N,) of the bank, ≥ 0.
        k: how many vote.
    """
    # Only ratios count: without its largest part the exponential cannot overflow.
    weights = ((neighbours.scores[:, :k] - neighbours.scores[:, :1]) / TEMPERATURE).double().exp()
    theirs = labels.to(neighbours.rows.device)[neighbours.rows[:, :k]]  # (Q, k)
    sums = (weights[:, None] * (theirs[:, None] == theirs[:, :, None])).sum(dim=2)  # (Q, k): of each neighbour's class
    best = sums >= sums.amax(dim=1, keepdim=True) * (1 - 1e-12)
    return torch.where(best, theirs, torch.iinfo(torch.int64).max).amin(dim=1)


def knn_accuracy(
    queries: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
    bank: Blocks,
    labels: torch.Tensor,
    ks: Sequence[int],
    between: Callable[[int], None] = lambda number: None,
) -> dict[int, float]:
    """For each k the share of the queries whose k nearest neighbours by cosine vote for their label (`vote`).

    Args:
        queries: (rows (Q, D), labels (Q,), `own` of `nearest`), a block at a time.
        bank: as for `nearest`.
        labels: int64 (N,) of the bank.
        ks: numbers of neighbours.
        between: called after each block with the number of its queries.
    """
    right, total = dict.fromkeys(ks, 0), 0
    for rows, theirs, own in queries:
        found = nearest(rows, bank, max(ks), "cosine", own)
        for k in ks:
            right[k] += int((vote(found, labels, k) == theirs.to(found.rows.device)).sum())
        total += len(rows)
        between(len(rows))
    return {k: count / total for k, count in right.items()}
