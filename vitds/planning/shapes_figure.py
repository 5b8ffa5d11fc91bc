"""The picture of a grid of shapes: Figure 8 of "Scaling Vision Transformers" (arXiv 2106.04560), one panel an MLP width."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from vitds.errors import UserError
from vitds.models import Shape, variant_shape
from vitds.planning.shapefinder import OPTIMIZERS, Found
from vitds.plots import plots

COLOURS = dict(zip(OPTIMIZERS, ((0.95, 0.55, 0.10), (0.25, 0.65, 0.25), (0.20, 0.40, 0.85)), strict=True))
"""The paper's: orange, green and blue; white does not fit."""
MARKED = {"g": variant_shape("ViT-g/14"), "G": variant_shape("ViT-G/14")}


def draw(rows: Sequence[Found], path: Path, title: str) -> None:
    """Write the picture: which optimizer a shape needs by colour, its speed by brightness, g and G marked.

    Of several numbers of heads the first that is found under the least demanding optimizer is shown.

    Raises:
        UserError: the file cannot be written, or its ending is of no picture.
    """
    panels = list(dict.fromkeys(row.row for row in rows))
    figure = plots("--figure").Figure(
        figsize=(4.2 * min(len(panels), 4) + 0.6, 4.0 * -(-len(panels) // 4) + 0.9), layout="constrained"
    )
    axes = figure.subplots(-(-len(panels) // 4), min(len(panels), 4), squeeze=False).ravel()
    fastest = max((fit.images_per_second for row in rows for fit in row.fits.values()), default=0.0)
    marks = {name: marked_panel(rows, shape) for name, shape in MARKED.items()}
    for axis, panel in zip(axes, panels, strict=False):
        inside = best_by_cell([row for row in rows if row.row == panel])
        widths, depths = (sorted({cell[i] for cell in inside}) for i in range(2))
        image = [[colour(inside.get((width, depth)), fastest) for width in widths] for depth in depths]
        axis.pcolormesh(edges(widths), edges(depths), image, edgecolors="0.85", linewidth=0.5)
        for name, shape in MARKED.items():
            if marks[name] == panel and within(shape, widths, depths):
                axis.plot(shape.width, shape.depth, "o", color="black", markersize=5)
                axis.annotate(name, (shape.width, shape.depth), (5, 5), textcoords="offset points", fontweight="bold")
        axis.set(title=f"MLP {panel}", xlabel="width", ylabel="depth", xticks=widths, yticks=depths)
        axis.tick_params(axis="x", rotation=60)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    patches = [
        figure.axes[0].scatter([], [], marker="s", s=60, color=shade, label=name) for name, shade in COLOURS.items()
    ]
    patches.append(
        figure.axes[0].scatter([], [], marker="s", s=60, color="white", edgecolors="0.6", label="does not fit")
    )
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=4,
        title="fits from here on; the darker, the slower",
        frameon=False,
    )
    figure.suptitle(title, fontsize=9)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--figure {path}: cannot be written: {error}") from None


def marked_panel(rows: Sequence[Found], shape: Shape) -> str:
    """The MLP width, as it was asked for, that is nearest to that of a shape at the shape's width."""
    return min(rows, key=lambda row: (abs(row.shape.width - shape.width), abs(row.shape.mlp_dim - shape.mlp_dim))).row


def best_by_cell(rows: Sequence[Found]) -> dict[tuple[int, int], Found]:
    """(width, depth) -> the row that fits under the optimizer that needs most."""
    order = [*OPTIMIZERS, None]
    cells = dict[tuple[int, int], Found]()
    for row in rows:
        cell = (row.shape.width, row.shape.depth)
        if cell not in cells or order.index(row.first) < order.index(cells[cell].first):
            cells[cell] = row
    return cells


def colour(row: Found | None, fastest: float) -> tuple[float, ...]:
    """Of the first optimizer that lets a shape fit, darker where it is slower; white where none does."""
    if row is None or row.first is None:
        return (1.0, 1.0, 1.0)
    light = 0.35 + 0.65 * (row.fits[row.first].images_per_second / fastest) ** 0.5
    return tuple(light * part for part in COLOURS[row.first])


def edges(centres: Sequence[int]) -> list[float]:
    """Borders of cells around ascending centres, half way between them."""
    inner = [(low + high) / 2 for low, high in pairwise(centres)]
    first, last = (inner[0], inner[-1]) if inner else (centres[0] + 0.5, centres[0] - 0.5)
    return [2 * centres[0] - first, *inner, 2 * centres[-1] - last]


def within(shape: Shape, widths: Sequence[int], depths: Sequence[int]) -> bool:
    """Whether a shape lies inside the drawn grid."""
    across, up = edges(widths), edges(depths)
    return across[0] <= shape.width <= across[-1] and up[0] <= shape.depth <= up[-1]
