"""Rows of a picture: a name each, and scores as marks with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hub_magmax.evaluation.scores import Score
from hub_magmax.reporting.figures.scales import Scale
from hub_magmax.reporting.figures.style import (
    GRID,
    LEFT,
    SMALL_POINTS,
    STRIPE,
    WIDTH,
    Series,
    inches,
    text_style,
)
from hub_magmax.text import cut_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Heights in inches: of a row with its name above its marks, and of one with its name beside them.
ROW, SLIM_ROW = 0.44, 0.155

#: Rows from which on they are slim, and rows that are drawn at most.
MOST_ROWS, MOST_SLIM_ROWS = 12, 40


def add_rows(axes: Axes, num_rows: int) -> None:
    """Number rows from the top, every other one on a stripe, with a grid across."""
    axes.set_ylim(num_rows, 0)
    for row in range(0, num_rows, 2):
        axes.axhspan(row, row + 1, facecolor=STRIPE, edgecolor="none", zorder=0)
    axes.grid(axis="x", color=GRID, linewidth=0.5, zorder=0.5)
    axes.set_axisbelow(True)


def repeat_axis(axes: Axes) -> None:
    """Show the numbers of the horizontal axis above as well."""
    axes.tick_params(axis="x", top=True, labeltop=True)


def place(axes: Axes) -> dict[str, Any]:
    """Return arguments for a text whose place is a share of the axes' width, and a row."""
    return {"transform": axes.get_yaxis_transform(), "va": "center"}


def write_names(axes: Axes, names: Sequence[str]) -> None:
    """Write a name to the left of each row, cut to the room there is."""
    where = axes.get_position()
    room = (where.x0 - LEFT) * WIDTH - 0.08
    for number, name in enumerate(cut_names(names, lambda text: inches(text, SMALL_POINTS) <= room)):
        left = (LEFT - where.x0) / where.width
        axes.text(left, number + 0.5, name, ha="left", **place(axes), **text_style(SMALL_POINTS))


def draw_score(
    axes: Axes, score: Score, series: Series, row: int, scale: Scale, *, has_interval: bool = True
) -> None:
    """Draw a score as a mark, and its interval as a line, in a row."""
    height = row + series.offset
    if has_interval:
        ends = scale.shown(score.low), scale.shown(score.high)
        axes.hlines(height, *ends, color=series.colour, linewidth=1.0, zorder=2)
    axes.plot([scale.shown(score.value)], [height], zorder=3, **series.style)
