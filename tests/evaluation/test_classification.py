"""Figures of a classification against loops over the images in float64, on uneven batches, several labels and ranks."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluation.counted import case, found
from tests.launching import ranks
from vitds.evaluation import confusion as room
from vitds.evaluation.confusion import Confusion, Ranking, average_precision

SHAPES = [(3, 7, 4, False), (6, 23, 5, True), (11, 40, 40, False), (6, 23, 1, True)]


def by_loops(classes: int, images: int, multi: bool, tops: tuple[int, ...] = (1, 5)) -> dict[str, Any]:
    """The same, image by image. Of equal logits torch takes which it likes, so ranks are by torch's own order."""
    import torch

    logits, labels = case(classes, images, multi)
    order = torch.from_numpy(logits).topk(min(max(tops), classes), dim=1).indices.numpy()
    right, by_class, loss, counted = Counter[int](), Counter[int](), 0.0, 0
    right_by_class, pairs = {k: Counter[int]() for k in tops}, Counter[tuple[int, int]]()
    for row, label, best in zip(logits.astype(np.float64), labels, order, strict=True):
        positive = set(np.flatnonzero(label)) if multi else {int(label)}
        if not positive:
            continue
        counted += 1
        loss += sum(np.logaddexp(0, -z if c in positive else z) for c, z in enumerate(row))
        for c in positive:
            by_class[c] += 1
            pairs[c, c if best[0] in positive else best[0]] += 1
        for k in tops:
            if positive & set(best[:k]):
                right[k] += 1
                for c in positive:
                    right_by_class[k][c] += 1
    listed = sorted((int(a), int(b), n) for (a, b), n in pairs.items())
    return {
        "figures": {f"eval/top{k}": right[k] / counted for k in tops}
        | {"eval/loss": loss / counted, "eval/images": counted},
        "images": [by_class[c] for c in range(classes)],
        "right": [[right_by_class[k][c] for c in range(classes)] for k in tops],
        "pairs": np.array(listed).T.tolist(),
    }


def check(answer: dict[str, Any], expected: dict[str, Any]) -> None:
    loss = answer["figures"].pop("eval/loss")
    assert loss == pytest.approx(expected["figures"].pop("eval/loss"), rel=1e-6)
    for name, value in expected.items():
        assert answer[name] == value, name


@pytest.mark.parametrize(("classes", "images", "batch", "multi"), SHAPES)
@pytest.mark.parametrize("tops", [(1, 5), (2,)])
def test_against_loops(classes: int, images: int, batch: int, multi: bool, tops: tuple[int, ...]) -> None:
    check(found(classes, images, batch, multi, tops), by_loops(classes, images, multi, tops))


def test_on_three_ranks_as_on_one() -> None:
    script = Path(__file__).with_name("counted.py")
    for arguments in ((6, 23, 3, "multi"),):
        done = ranks(3, script, *map(str, arguments))
        assert done.returncode == 0, done.stdout
        answer = json.loads(done.stdout.split("FOUND ")[1].splitlines()[0])
        check(answer, by_loops(6, 23, True))
        assert answer["map"] == list(found(6, 23, 23, True)["map"])


def test_average_precision_is_scikit_learns() -> None:
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    for images in (1, 2, 9, 50):
        scores = rng.integers(0, 6, images) / 2
        positive = rng.random(images) < 0.4
        positive[rng.integers(images)] = True
        assert average_precision(scores, positive) == pytest.approx(
            average_precision_score(positive, scores), abs=1e-12
        )


def test_mean_average_precision_is_over_the_classes_that_have_an_image() -> None:
    logits, labels = case(6, 23, True)
    kept = labels.sum(axis=1) > 0
    expected = [average_precision(logits[kept, c], labels[kept, c] > 0) for c in range(6) if labels[kept, c].any()]
    assert found(6, 23, 5, True)["map"] == (pytest.approx(np.mean(expected)), len(expected))


def test_scores_that_are_too_many_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "RANKING_BYTES", 5 * 6 * 10)
    assert found(6, 23, 5, True)["map"] is None
    assert Ranking().mean_average_precision() is None


def test_waiting_pairs_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "COMPACT", 3)
    check(found(6, 23, 2, True), by_loops(6, 23, True))


def test_the_worst_pairs() -> None:
    import torch

    confusion = Confusion(4, (1,))
    labels = [0, 0, 0, 1, 1, 2, 2, 2, 3]
    predicted = [1, 1, 2, 1, 0, 3, 3, 3, 3]
    positive = torch.nn.functional.one_hot(torch.tensor(labels), 4)
    confusion.add(torch.zeros(9, 4), torch.tensor(predicted)[:, None], positive)
    assert [(m.label, m.predicted, m.images) for m in confusion.worst(2)] == [(2, 3, 3), (0, 1, 2)]
    assert {c: m.predicted for c, m in confusion.most_confused().items()} == {2: 3, 0: 1, 1: 0}
    assert confusion.images.tolist() == [3, 2, 3, 1]
