"""Picture of a diagnosis: how alike the task vectors are, by pair of tasks and by layer.

A matrix of all pairs has the cosine above its diagonal and the agreement in sign below. Under it is a row per
layer, whose columns are pairs of few tasks, or else tasks, with the mean cosine with the others. Tasks have
numbers, which head the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub_magmax.kernels.lazy_imports import np
from hub_magmax.reporting.diagnosis import Diagnosis
from hub_magmax.reporting.figures.style import (
    LEFT,
    MERGED,
    NAMES,
    OWN,
    QUIET,
    RIGHT,
    SMALL_POINTS,
    WIDTH,
    add_axes,
    inches,
    new_figure,
    text_style,
)
from hub_magmax.reporting.figures.writing import write_figure
from hub_magmax.text import cut_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Inches: a row of cells, one with numbers in its cells, what stands above a panel, and the scale below.
_CELL, _CELL_WITH_NUMBER, _ABOVE, _SCALE = 0.125, 0.2, 0.5, 0.85

#: Most tasks of the matrix; tasks with numbers in its cells; layers of few and of many tasks; pairs by layer.
_MOST_TASKS, _WITH_NUMBERS, _MOST_LAYERS, _FEW_LAYERS, _MOST_PAIRS = 40, 8, 40, 20, 15

#: Inches between columns from which on each has its number.
_COLUMN = 0.12

#: Opacity of a cosine of one: less than whole, so that numbers stay legible in light and dark.
_OPACITY = 0.75

_MINUS = "\N{MINUS SIGN}"


def draw_cosines(found: Diagnosis, path: Path) -> tuple[Path, Path]:
    """Write a picture with the similarity of every two task vectors, and of those of every layer.

    Raises:
        OutputError: If it cannot be written.
    """
    title = "Cosine and agreement in sign of every two task vectors, and their cosines in every layer"
    return write_figure(cosines_figure(found), path, title)


def cosines_figure(found: Diagnosis) -> Figure:
    """Return the figure that `draw_cosines` writes."""
    count = min(len(found.tasks), _MOST_TASKS)
    blocks, layers = _rows_of_layers(found, count)
    columns, cells = _columns_of_layers(blocks)
    tall = (_CELL_WITH_NUMBER if count <= _WITH_NUMBERS else _CELL) * count
    below = _SCALE + _CELL * len(layers)
    figure = new_figure(below + _ABOVE + tall + _ABOVE)
    matrix = add_axes(figure, NAMES, RIGHT, below + _ABOVE, tall)
    _draw_matrix(matrix, found, count)
    some = f" (the first {count} of {len(found.tasks)})" if count < len(found.tasks) else ""
    _say_above(figure, matrix, f"tasks{some}; above the diagonal: cosine, below: agreement in sign")
    by_layer = add_axes(figure, NAMES, RIGHT, _SCALE, _CELL * len(layers))
    _draw_cells(by_layer, cells)
    _head_columns(by_layer, columns)
    _name_rows(by_layer, layers)
    is_by_pair = count > 1 and len(columns) == count * (count - 1) // 2 and "," in columns[0]
    what = "pair of tasks: their cosine" if is_by_pair else "task: its mean cosine with the others"
    _say_above(figure, by_layer, f"layers; a column is a {what}")
    _draw_scale(figure)
    looked_at = f"n = {found.whole.num_looked_at:,} of {found.whole.num_elements:,} elements"
    _write(figure, 1, 0.09, looked_at, QUIET)
    return figure


def _draw_matrix(axes: Axes, found: Diagnosis, count: int) -> None:
    """Draw cosines above the diagonal, agreements in sign from -1 to 1 below, and few also as numbers."""
    cosines = found.whole.cosines[:count, :count]
    agreement = found.whole.sign_agreement[:count, :count]
    is_above = np.triu(np.ones((count, count), bool), 1)
    cells = np.where(is_above, cosines, 2 * agreement - 1)
    np.fill_diagonal(cells, 0.0)
    _draw_cells(axes, cells)
    numbers = [str(number + 1) for number in range(count)]
    _head_columns(axes, numbers)
    _name_rows(axes, found.tasks[:count], numbers)
    for row, column in np.ndindex(cells.shape) if count <= _WITH_NUMBERS else ():
        if row != column:
            value = f"{cosines[row, column]:.2f}" if row < column else f"{100 * agreement[row, column]:.0f} %"
            middle: dict[str, Any] = {"ha": "center", "va": "center_baseline"}
            axes.text(column, row, value.replace("-", _MINUS), **middle, **text_style(SMALL_POINTS))


def _draw_cells(axes: Axes, values: np.ndarray) -> None:
    """Draw numbers from -1 to 1 as colours that are transparent at 0, so that the page shows through."""
    axes.imshow(_colours(values), aspect="auto", interpolation="none")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)


def _colours(values: np.ndarray) -> np.ndarray:
    from matplotlib.colors import to_rgb

    colours = np.where(values[..., None] > 0, to_rgb(MERGED), to_rgb(OWN))
    opacity = _OPACITY * np.sqrt(np.abs(values).clip(0, 1))
    return np.concatenate([colours, opacity[..., None]], axis=-1)


def _head_columns(axes: Axes, names: Sequence[str]) -> None:
    """Write a short name above each column; where there are too many, above the first and every fifth."""
    width = (RIGHT - NAMES) * WIDTH / len(names)
    is_turned = _COLUMN <= width < max(inches(name, SMALL_POINTS) for name in names) + 0.03
    style = text_style(SMALL_POINTS) | {"rotation": 90 if is_turned else 0, "ha": "center", "va": "bottom"}
    height = axes.get_window_extent().height / axes.get_figure().dpi  # type: ignore[union-attr]
    for number, name in enumerate(names):
        if width >= _COLUMN or number == 0 or (number + 1) % 5 == 0:
            axes.text(number, 1 + 0.03 / height, name, transform=axes.get_xaxis_transform(), **style)


def _name_rows(axes: Axes, names: Sequence[str], numbers: Sequence[str] = ()) -> None:
    """Write a name, after its number where it has one, to the left of each row."""
    # Padded by spaces as wide as digits.
    starts = [f"{number:\u2007>{len(numbers[-1])}}  " for number in numbers] or [""] * len(names)
    room = (NAMES - LEFT) * WIDTH - 0.08 - max(inches(start, SMALL_POINTS) for start in starts)
    left = -(NAMES - LEFT) / (RIGHT - NAMES)
    where: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": "left"}
    shown = cut_names(names, lambda text: inches(text, SMALL_POINTS) <= room)
    for row, (start, name) in enumerate(zip(starts, shown, strict=True)):
        axes.text(left, row, start + name, **where, **text_style(SMALL_POINTS))


def _say_above(figure: Figure, axes: Axes, words: str) -> None:
    """Write what a panel shows, in a line above its columns' names."""
    top = axes.get_position().y1 * float(figure.get_figheight())
    _write(figure, 0, top + 0.27, words)


def _write(figure: Figure, side: int, height: float, words: str, colour: str | None = None) -> None:
    """Write a line `height` inches above the end of the figure, at its left or right."""
    share = height / float(figure.get_figheight())
    style = text_style(SMALL_POINTS, colour) if colour else text_style(SMALL_POINTS)
    figure.text((LEFT, RIGHT)[side], share, words, ha=("left", "right")[side], va="center", **style)


def _draw_scale(figure: Figure) -> None:
    """Draw the colours from -1 to 1, with cosines above and agreements in sign below."""
    bar = add_axes(figure, NAMES, RIGHT, 0.38, 0.1)
    bar.imshow(
        _colours(np.linspace(-1, 1, 201)[None]), aspect="auto", interpolation="none", extent=(-1, 1, 0, 1)
    )
    bar.set_yticks([])
    bar.set_xticks([-1, -0.5, 0, 0.5, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    above: dict[str, Any] = {"transform": bar.get_xaxis_transform(), "va": "bottom"}
    for value in (-1.0, -0.5, 0.0, 0.5, 1.0):
        side = {-1.0: "left", 1.0: "right"}.get(value, "center")
        bar.text(value, 1.25, f"{value:g}".replace("-", _MINUS), ha=side, **above, **text_style(SMALL_POINTS))
    ticks = bar.get_xticklabels()
    ticks[0].set_horizontalalignment("left")
    ticks[-1].set_horizontalalignment("right")
    _write(figure, 0, 0.55, "cosine")
    _write(figure, 0, 0.28, "agreement in sign")


def _columns_of_layers(blocks: Sequence[np.ndarray]) -> tuple[list[str], np.ndarray]:
    """Return the names of the columns, by the tasks' numbers, and the cells of a layer each."""
    count = len(blocks[0])
    pairs = list(combinations(range(count), 2))
    if pairs and len(pairs) <= _MOST_PAIRS:
        names = [f"{one + 1},{other + 1}" for one, other in pairs]
        return names, np.array([[block[pair] for pair in pairs] for block in blocks])
    others = max(count - 1, 1)
    means = [(block.sum(axis=1) - block.diagonal()) / others for block in blocks]
    return [str(number + 1) for number in range(count)], np.array(means)


def _rows_of_layers(found: Diagnosis, count: int) -> tuple[list[np.ndarray], list[str]]:
    """Return the cosines of every layer, or the means of several that follow each other, and their names."""
    most = _MOST_LAYERS if count <= _WITH_NUMBERS else _FEW_LAYERS
    size = -(-len(found.layers) // most)
    rows = [found.layers[start : start + size] for start in range(0, len(found.layers), size)]
    means = [np.mean([layer.cosines[:count, :count] for layer in row], axis=0) for row in rows]
    return means, [row[0].name + (" …" if size > 1 else "") for row in rows]
