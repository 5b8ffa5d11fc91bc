"""Neighbours and their votes against float64 numpy, in blocks of any size."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
import torch

from vitds.evaluation.neighbours import Neighbours, knn_accuracy, nearest, vote


def made(rows: int, width: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * torch.rand(rows, 1, generator=generator) * 5


def expected(queries: torch.Tensor, bank: torch.Tensor, metric: str) -> np.ndarray:
    q, b = queries.double().numpy(), bank.double().numpy()
    if metric == "cosine":
        return (q @ b.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    return -np.linalg.norm(q[:, None] - b, axis=2)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("size", [1, 7, 50, 64])
def test_neighbours_are_numpys_whatever_the_blocks(metric: str, size: int) -> None:
    bank, queries = made(50), made(9, seed=1) + 100 * (metric == "euclidean")
    bank = bank + 100 * (metric == "euclidean")  # far from 0, where digits cancel
    scores = expected(queries, bank, metric)
    found = nearest(queries, lambda: bank.split(size), 5, metric)
    best = np.argsort(-scores, axis=1)[:, :5]
    assert np.array_equal(found.rows, best)
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, best, axis=1), atol=1e-5)


def test_an_image_is_no_neighbour_of_itself() -> None:
    bank = made(20)
    bank[7] = bank[3]
    found = nearest(bank, lambda: bank.split(6), 3, own=torch.arange(20))
    assert not (found.rows == torch.arange(20)[:, None]).any()
    assert (found.rows[3, 0], found.rows[7, 0]) == (7, 3)
    assert (nearest(bank, lambda: bank.split(6), 1).scores > 1 - 1e-6).all()


def naive_vote(scores: list[float], labels: list[int]) -> int:
    votes: dict[int, float] = defaultdict(float)
    for score, label in zip(scores, labels, strict=True):
        votes[label] += np.exp(score / 0.07)
    return min(votes, key=lambda label: (-round(votes[label] / max(votes.values()), 10), label))


@pytest.mark.parametrize("k", [1, 4, 10])
def test_votes_are_weighted_by_cosine(k: int) -> None:
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(200, 10, generator=generator).sort(dim=1, descending=True).values * 0.2 + 0.5
    labels = torch.randint(0, 5, (40,), generator=generator)
    rows = torch.randint(0, 40, (200, 10), generator=generator)
    found = vote(Neighbours(scores, rows), labels, k)
    assert found.tolist() == [
        naive_vote(s[:k], labels[r[:k]].tolist()) for s, r in zip(scores.tolist(), rows, strict=True)
    ]


def test_of_equal_votes_the_smaller_class_wins() -> None:
    found = vote(Neighbours(torch.tensor([[0.5, 0.5]]), torch.tensor([[0, 1]])), torch.tensor([4, 2]), 2)
    assert found.tolist() == [2]


def test_accuracy_is_the_share_of_right_votes() -> None:
    bank, queries = made(60), made(31, seed=3)
    labels, theirs = torch.arange(60) % 4, torch.arange(31) % 4
    cuts = list(pairwise([0, 10, 25, 31]))
    blocks = ((queries[a:b], theirs[a:b], None) for a, b in cuts)
    seen: list[int] = []
    found = knn_accuracy(blocks, lambda: bank.split(13), labels, [1, 5], seen.append)
    whole = nearest(queries, lambda: [bank], 5)
    for k in (1, 5):
        assert found[k] == (vote(whole, labels, k) == theirs).double().mean()
    assert seen == [b - a for a, b in cuts]
