"""The picture of which classes are mistaken for which: a heat map, and the worst pairs in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitds.evaluation.confusion import Confusion
from vitds.inference.outputs import written
from vitds.plots import plots

LABELLED = 32
"""Up to so many classes each has its name at the edges, and its count in the cell."""
CELLS = 250
"""Of the heat map along an edge, at most: what is smaller than a pixel would not be seen."""
WORST = 30
"""Pairs that are named beside a heat map."""
NAME = 28
"""Letters of a name that are shown."""


def draw(confusion: Confusion, names: Sequence[str], path: Path, title: str) -> None:
    """Write the picture.

    Rows are the images' classes, columns the predictions; a cell's shade is its share of the row's class. Of many classes
    several neighbours share a cell, which then shows the largest of their shares, and the worst pairs stand beside it.

    Raises:
        UserError: the file cannot be written.
    """
    few = confusion.num_classes <= LABELLED
    side = max(4.5, 0.42 * confusion.num_classes) if few else 8.0
    figure = plots("--confusion").Figure(figsize=(side + (4.0 if few else 6.0), side + 0.8), layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=(side, 3.0 if few else 5.0))
    shares = cells(confusion)
    count = len(shares)
    picture = axes[0].imshow(
        shares, cmap="Blues", norm=plots("--confusion", "colors").PowerNorm(0.5, 0, 1), interpolation="nearest",
        extent=(-0.5, confusion.num_classes - 0.5, confusion.num_classes - 0.5, -0.5),
    )  # fmt: skip
    figure.colorbar(picture, ax=axes[0], shrink=0.6, label="share of the class", ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    axes[0].set(xlabel="prediction", ylabel="class")
    if few:
        short = [shortened(name) for name in names]
        axes[0].set_xticks(range(count), short, rotation=90)
        axes[0].set_yticks(range(count), short)
        for label, predicted, images in zip(*confusion.pairs, strict=True):
            shade = "white" if shares[label, predicted] > 0.4 else "black"
            axes[0].text(predicted, label, f"{images}", ha="center", va="center", fontsize=8, color=shade)
    elif count < confusion.num_classes:
        axes[0].set_title(f"each cell the largest share of {-(-confusion.num_classes // count)} classes", fontsize=8)
    axes[1].set_axis_off()
    axes[1].text(0, 1, "\n".join(worst_in_words(confusion, names)), va="top", fontsize=8, family="monospace")
    figure.suptitle(title, fontsize=10)
    with written("--confusion", path) as temporary:
        figure.savefig(temporary, dpi=130, bbox_inches="tight")


def cells(confusion: Confusion) -> np.ndarray:
    """Shares of each row's class (M, M), M the number of classes or of groups of neighbours, of which the largest counts."""
    labels, predicted, images = confusion.pairs
    group = -(-confusion.num_classes // CELLS)
    side = -(-confusion.num_classes // group)
    found = np.zeros((side, side))
    np.maximum.at(found, (labels // group, predicted // group), images / confusion.images[labels])
    return found


def worst_in_words(confusion: Confusion, names: Sequence[str]) -> list[str]:
    """The pairs with most images, one a line under a heading."""
    worst = confusion.worst(WORST)
    if not worst:
        return ["no image was mistaken"]
    lines = [
        f"{one.images:>5} of {confusion.images[one.label]:<6} {shortened(names[one.label])} → {shortened(names[one.predicted])}"
        for one in worst
    ]
    return ["mistaken most often:", *lines]


def shortened(name: str) -> str:
    """At most NAME letters, all of which can be drawn as they are."""
    name = name.replace("$", r"\$")
    return name if len(name) <= NAME else name[: NAME - 1] + "…"
