"""A linear probe: regularised least squares on whitened features, solved exactly in float64 ("fewshot_lsr" of the paper).

With features f (N, D) of the training images and C classes, mean m and population standard deviation s over the N images:

    X = [(f − m) / (s + 1e-5), 100]   (N, D + 1)        Y = 2 · onehot − 1   (N, C)
    W = (XᵀX + l2)⁻¹ XᵀY              where N ≥ D + 1   (primal)
    W = Xᵀ (XXᵀ + l2)⁻¹ Y             else              (dual)

and the class of an image is argmax X W, X being made with the training images' m and s. The bias column is regularised as
all others are. The reference takes the inverses from an eigendecomposition, here they are Cholesky solutions.

Images lie on whichever rank met them. For the primal form nothing but sums travels: of the classes' features and of the
Gram matrix, taken about a mean of all rows, so that subtracting this probe's own mean cancels no digits. Its whitened
columns add up to 0, so the bias column is orthogonal to them, and solved by itself. For the dual form, which has fewer rows
than features, the rows themselves are added up to one matrix on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vitds import dist
from vitds.errors import UserError

BIAS = 100.0
EPSILON = 1e-5
ROWS_AT_ONCE = 2048
"""Rows that are on the device in float64 at a time: 26 MiB of G/14's features."""


class NoSolution(UserError):
    """There is no probe of these features; raised on all ranks."""


class NotFinite(NoSolution):
    """Features with NaN or infinities, on any rank."""


@dataclass(frozen=True)
class Rows:
    """This rank's training images. Each is in the probe of k shots if its `place` is below k.

    Args:
        features: float32 (n, D), on the host.
        classes: int64 (n,).
        places: int64 (n,): which of its class's images it is, from 0; each (class, place) is on one rank.
    """

    features: torch.Tensor
    classes: torch.Tensor
    places: torch.Tensor

    def among(self, start: int, end: int) -> Rows:
        """Those with places in [start, end)."""
        chosen = (self.places >= start) & (self.places < end)
        return Rows(self.features[chosen], self.classes[chosen], self.places[chosen])


@dataclass(frozen=True)
class Probe:
    """A solution. All float64, on one device."""

    mean: torch.Tensor
    """(D,)"""
    scale: torch.Tensor
    """(D,): standard deviation + 1e-5."""
    weights: torch.Tensor
    """(D + 1, C); the bias' row is the last."""

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """X W (n, C) of features (n, D), on the probe's device."""
        whitened = (features.to(self.mean) - self.mean) / self.scale
        return whitened @ self.weights[:-1] + BIAS * self.weights[-1]

    def count_right(self, features: torch.Tensor, classes: torch.Tensor) -> int:
        """How many of features (n, D) get their class (n,); of equal scores the first class's counts."""
        right = 0
        for part, its_classes in zip(features.split(ROWS_AT_ONCE), classes.split(ROWS_AT_ONCE), strict=True):
            right += int((self.scores(part).argmax(dim=1) == its_classes.to(self.mean.device)).sum())
        return right


def solve(
    rows: Rows,
    shots: Sequence[int],
    num_classes: int,
    l2: float,
    device: torch.device | str = "cpu",
    between: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Probe]]:
    """The probes of each number of shots, ascending. Collective; every rank has the same ones.

    What a smaller probe has summed up a larger one goes on from.

    Args:
        rows: of one draw of images; ranks may have any number of them.
        shots: numbers of images per class; a class that has fewer gives all it has.
        num_classes: C.
        l2: added to the diagonal.
        device: computes.
        between: called before each probe, on every rank.

    Raises:
        NotFinite: features that are not finite.
        NoSolution: too small an l2 for features that depend on each other.
        UserError: no image at all.
    """
    width = rows.features.shape[1]
    refuse_not_finite(rows.features)
    shift = _mean(rows.features, device)
    sums, summed = _Sums(width, num_classes, device), 0
    for k in sorted(set(shots)):
        between()
        number = int(_sum(torch.tensor([int((rows.places < k).sum())], device=device)))
        if number == 0:
            raise UserError("a probe needs at least one image that can be used, there is none")
        if number >= width + 1:
            sums.add(rows.among(summed, k), shift)
            summed = k
            yield k, _primal(sums, shift, l2)
        else:
            yield k, _dual(rows.among(0, k), num_classes, l2, device)


def refuse_not_finite(features: torch.Tensor, where: str = "") -> None:
    """Collective. `where`: what they are features of, for the message.

    Raises:
        NotFinite: some rank's features (n, D) hold NaN or infinities.
    """
    wrong = int((~features.isfinite().all(dim=1)).sum())
    everywhere = sum(dist.all_objects(wrong))
    if everywhere:
        raise NotFinite(
            f"{where and f'{where}: '}the features of {everywhere} images are not finite: the model's weights or activations "
            "overflow"
        )


class _Sums:
    """Over this rank's rows x = f − shift: of each class their number and sum, and the Gram matrix Σ xxᵀ; float64."""

    def __init__(self, width: int, num_classes: int, device: torch.device | str) -> None:
        self.counts = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self.by_class = torch.zeros(num_classes, width, dtype=torch.float64, device=device)
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, rows: Rows, shift: torch.Tensor) -> None:
        for features, classes in zip(rows.features.split(ROWS_AT_ONCE), rows.classes.split(ROWS_AT_ONCE), strict=True):
            x, classes = features.to(shift) - shift, classes.to(shift.device)
            self.counts += torch.bincount(classes, minlength=len(self.counts))
            self.by_class.index_add_(0, classes, x)
            self.gram.addmm_(x.T, x)

    def everywhere(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Over all ranks' rows. Collective."""
        return _sum(self.counts.clone()), _sum(self.by_class.clone()), _sum(self.gram.clone())


def _primal(sums: _Sums, shift: torch.Tensor, l2: float) -> Probe:
    counts, by_class, gram = sums.everywhere()
    number = counts.sum()
    mean = by_class.sum(dim=0) / number
    scale = (gram.diagonal() / number - mean**2).clamp_(min=0).sqrt_() + EPSILON
    gram -= number * torch.outer(mean, mean)
    gram /= torch.outer(scale, scale)
    targets = 2 * (by_class - torch.outer(counts, mean)).T / scale[:, None]  # (D, C); −1 falls out: columns add up to 0
    weights = _solution(gram, targets, l2)
    bias = BIAS * (2 * counts - number) / (BIAS**2 * number + l2)
    return Probe(shift + mean, scale, torch.cat([weights, bias[None]]))


def _dual(rows: Rows, num_classes: int, l2: float, device: torch.device | str) -> Probe:
    features, classes = _gathered(rows, num_classes, device)  # (N, D), (N,)
    mean = features.mean(dim=0)
    scale = (features - mean).square_().mean(dim=0).sqrt_() + EPSILON
    x = torch.cat([(features - mean) / scale, torch.full_like(features[:, :1], BIAS)], dim=1)  # (N, D + 1)
    y = 2 * torch.nn.functional.one_hot(classes, num_classes).double() - 1
    return Probe(mean, scale, x.T @ _solution(x @ x.T, y, l2))


def _solution(matrix: torch.Tensor, targets: torch.Tensor, l2: float) -> torch.Tensor:
    """(matrix + l2)⁻¹ targets; `matrix` is changed."""
    matrix.diagonal().add_(l2)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise NoSolution(f"with l2 = {l2:g} the equations have no solution in float64: features depend on each other")
    return torch.cholesky_solve(targets, factor)


def _gathered(rows: Rows, num_classes: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) float64 and classes (N,) of all ranks' rows, by place and then by class: in the same order on any
    number of ranks. Collective."""
    own = rows.places * num_classes + rows.classes
    names = torch.tensor(sorted(name for ranks in dist.all_objects(own.tolist()) for name in ranks), dtype=torch.int64)
    whole = torch.zeros(len(names), rows.features.shape[1], device=device)
    whole[torch.searchsorted(names, own).to(device)] = rows.features.to(device)
    return _sum(whole).double(), (names % num_classes).to(device)


def _mean(features: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """(D,) float64 over all ranks' rows. Collective."""
    total = torch.zeros(features.shape[1] + 1, dtype=torch.float64, device=device)
    total[-1] = len(features)
    for part in features.split(ROWS_AT_ONCE):
        total[:-1] += part.to(total).sum(dim=0)
    _sum(total)
    return total[:-1] / total[-1].clamp(min=1)


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    return dist.sum_over_ranks(tensor)
