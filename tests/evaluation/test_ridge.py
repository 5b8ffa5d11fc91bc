"""The probe's equations against numpy, alone and on several ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.evaluation import reference
from tests.launching import ranks
from vitds.evaluation import ridge
from vitds.evaluation.probe_sets import draw
from vitds.evaluation.ridge import NoSolution, NotFinite, Probe, Rows, solve

SCRIPT = "tests/evaluation/probed.py"


def made(width: int, num_classes: int, per_class: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) as networks have them: of unlike scales, far from 0, one constant, one almost; and labels (N,)."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(num_classes), per_class))
    centres = rng.normal(size=(num_classes, width))
    features = (centres[labels] + rng.normal(size=(len(labels), width))) * rng.lognormal(size=width) + 30
    features[:, 0], features[:, 1] = 3.7, 2 + 1e-6 * rng.normal(size=len(labels))
    return features.astype(np.float32), labels


def rows_of(features: np.ndarray, labels: np.ndarray, most: int, seed: int, num_classes: int) -> Rows:
    places = draw(labels, seed, most, num_classes)
    kept = places >= 0
    return Rows(*(torch.from_numpy(array[kept]) for array in (features, labels, places)))


def test_the_draw_is_numpys_class_by_class_and_nested() -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 7, 200)
    labels[labels == 3] = 4  # a class without images draws nothing from the generator
    for seed in (0, 2):
        places = draw(labels, seed, 25, 8)
        for shots in (1, 5, 25):
            expected = reference.drawn(labels, shots, seed)
            assert sorted(np.flatnonzero((places >= 0) & (places < shots))) == sorted(expected)
    unlabelled = labels.copy()
    unlabelled[::9] = -1
    assert (draw(unlabelled, 0, 5, 8)[::9] == -1).all()


@pytest.mark.parametrize(
    ("width", "num_classes", "per_class", "shots"),
    [
        (12, 5, [30] * 5, [1, 5, 10, 25]),  # dual, then primal that goes on from primal
        (24, 5, [5] * 5, [5]),  # N = D + 1: the first that is primal
        (25, 5, [5] * 5, [5]),  # N = D: the last that is dual
        (40, 4, [30] * 4, [25, 1, 10]),  # any order
        (9, 3, [40, 2, 11], [1, 10, 25]),  # small classes give all they have
        (300, 10, [30] * 10, [10, 25]),
    ],
)
def test_equals_the_equations(width: int, num_classes: int, per_class: list[int], shots: list[int]) -> None:
    features, labels = made(width, num_classes, per_class)
    unseen, classes = made(width, num_classes, [20] * num_classes, seed=1)
    solved = dict(solve(rows_of(features, labels, max(shots), 1, num_classes), shots, num_classes, 1024.0))
    assert list(solved) == sorted(shots)
    for k in shots:
        chosen = reference.drawn(labels, k, 1)
        expected = reference.ridge(features[chosen], labels[chosen], num_classes, 1024.0)
        probe = solved[k]
        np.testing.assert_allclose(probe.mean, expected[0], rtol=1e-12)
        np.testing.assert_allclose(probe.scale, expected[1], rtol=1e-8)
        largest = np.abs(expected[2]).max()
        np.testing.assert_allclose(probe.weights, expected[2], rtol=1e-8, atol=1e-8 * largest)
        predicted = reference.predictions(expected, unseen)
        assert np.array_equal(probe.scores(torch.from_numpy(unseen)).argmax(dim=1), predicted)
        assert probe.count_right(torch.from_numpy(unseen), torch.from_numpy(classes)) == (predicted == classes).sum()


@pytest.mark.parametrize(("width", "form"), [(24, "_primal"), (25, "_dual")])
def test_the_form_is_chosen_by_the_bias_counted(width: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """25 images: the forms agree, so that only which of them is solved tells where the border lies."""
    features, labels = made(width, 5, [5] * 5)
    other = "_dual" if form == "_primal" else "_primal"
    monkeypatch.delattr(ridge, other)
    assert len(list(solve(rows_of(features, labels, 5, 0, 5), [5], 5, 1024.0))) == 1


def test_of_equal_scores_the_first_class_counts() -> None:
    probe = Probe(torch.zeros(2).double(), torch.ones(2).double(), torch.zeros(3, 4).double())
    assert probe.count_right(torch.randn(5, 2), torch.tensor([0, 1, 0, 2, 3])) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    features, labels = made(6, 3, [4] * 3)
    features[2, 4] = bad
    with pytest.raises(NotFinite, match="features of 1 images are not finite"):
        list(solve(rows_of(features, labels, 4, 0, 3), [4], 3, 1024.0))


@pytest.mark.parametrize(("shots", "form"), [(2, "_dual"), (10, "_primal")])
def test_equations_that_float64_cannot_solve_are_refused(
    shots: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = made(30, 4, [10] * 4)
    features[:] = features[:, 2:3]  # every column the same: rank two with the bias
    monkeypatch.delattr(ridge, "_dual" if form == "_primal" else "_primal")
    with pytest.raises(NoSolution, match="with l2 = 1e-30 the equations have no solution in float64"):
        list(solve(rows_of(features, labels, shots, 0, 4), [shots], 4, 1e-30))


@pytest.mark.launch
@pytest.mark.parametrize("number", [2, 3])
def test_any_number_of_ranks_gives_the_same(number: int, tmp_path) -> None:
    done = ranks(number, SCRIPT, str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:]
    alone = ranks(1, SCRIPT, str(tmp_path))
    assert alone.returncode == 0, alone.stdout[-3000:]
    one, several = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, number))
    for name in ("dual", "primal"):
        np.testing.assert_allclose(several[name], one[name], rtol=1e-9, atol=1e-12)
    assert one["figures"] == several["figures"]
    assert one["refused"] == several["refused"] == "the features of 1 images are not finite"
