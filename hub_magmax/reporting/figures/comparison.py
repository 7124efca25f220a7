"""Picture of a comparison: the score and interval of every way to merge that was tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hub_magmax.evaluation.scores import Score
from hub_magmax.reporting.figures.rows import (
    MOST_ROWS,
    ROW,
    SLIM_ROW,
    add_rows,
    draw_score,
    place,
    repeat_axis,
    write_names,
)
from hub_magmax.reporting.figures.scales import Scale
from hub_magmax.reporting.figures.style import (
    BOTTOM,
    LABEL_POINTS,
    LEFT,
    MERGED_MODEL,
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


class Row(NamedTuple):
    """One way to merge.

    Attributes:
        label: Says which.
        score: What it reached; of several seeds the mean.
        won: Whether it is the one that was chosen.
        deviation: Standard deviation of the score over the seeds, where there were several.
    """

    label: str
    score: Score
    won: bool = False
    deviation: float | None = None


#: Inches above the first row, and with the numbers of the axis.
_ABOVE, _ABOVE_SLIM = 0.1, 0.25

#: Of the width, in slim rows: the start of the marks, to the left of which are labels.
_LABELS = 0.5


def draw_comparison(rows: Sequence[Row], scale: Scale, path: Path) -> tuple[Path, Path]:
    """Write a picture with one row per method: its score and 95 % interval, the winner filled.

    Args:
        rows: From the top.
        scale: Of the scores.
        path: PNG to write; an SVG is written beside it.

    Raises:
        OutputError: If they cannot be written.
    """
    title = f"{scale.metric} of the ways to merge that were compared"
    return write_figure(comparison_figure(rows, scale), path, title)


def comparison_figure(rows: Sequence[Row], scale: Scale) -> Figure:
    """Return the figure that `draw_comparison` writes."""
    values = [_written(row, scale) for row in rows]
    labels, widest = [row.label for row in rows], max(inches(value, SMALL_POINTS) for value in values)
    draw = _slim_axes if len(rows) > MOST_ROWS else _roomy_axes
    figure, axes, form = draw(labels, widest)
    add_rows(axes, len(rows))
    axes.set_xlim(*scale.limits([row.score for row in rows]))
    for number, (row, value) in enumerate(zip(rows, values, strict=True)):
        series = replace(MERGED_MODEL, filled=row.won, offset=form.mark, size=form.size)
        draw_score(axes, row.score, series, number, scale)
        where = place(axes) | {"ha": "right"}
        axes.text(form.right, number + form.text, value, **where, **text_style(SMALL_POINTS, QUIET))
    _say_below(figure, rows, scale)
    return figure


class _Form(NamedTuple):
    """Where things are in a row: marks and texts below its top, in rows, and the end of the scores."""

    mark: float
    size: float
    text: float
    right: float


def _slim_axes(labels: Sequence[str], widest: float) -> tuple[Figure, Axes, _Form]:
    """Return axes between the labels and the scores of rows of one line."""
    figure = new_figure(_ABOVE_SLIM + SLIM_ROW * len(labels) + BOTTOM)
    axes = add_axes(figure, _LABELS, RIGHT - (widest + 0.12) / WIDTH, BOTTOM, SLIM_ROW * len(labels))
    repeat_axis(axes)
    write_names(axes, labels)
    found = axes.get_position()
    return figure, axes, _Form(0.5, 3.2, 0.5, (RIGHT - found.x0) / found.width)


def _roomy_axes(labels: Sequence[str], widest: float) -> tuple[Figure, Axes, _Form]:
    """Return axes with labels above the marks, cut to the room that the scores leave."""
    figure = new_figure(_ABOVE + ROW * len(labels) + BOTTOM)
    axes = add_axes(figure, LEFT, RIGHT, BOTTOM, ROW * len(labels))
    room = (RIGHT - LEFT) * WIDTH * 0.97 - widest - 0.08
    for number, label in enumerate(cut_names(labels, lambda text: inches(text, LABEL_POINTS) <= room)):
        axes.text(0.015, number + 0.22, label, ha="left", **place(axes), **text_style(LABEL_POINTS))
    return figure, axes, _Form(0.68, 4.0, 0.22, 0.985)


def _written(row: Row, scale: Scale) -> str:
    value = scale.format.value(row.score.value)
    return value if row.deviation is None else f"{value} ± {scale.format.value(row.deviation)}"


def _say_below(figure: Figure, rows: Sequence[Row], scale: Scale) -> None:
    whole = float(figure.get_figheight())
    title = scale.title((RIGHT - LEFT) * WIDTH)
    figure.text(LEFT, 0.30 / whole, title, va="center", **text_style(SMALL_POINTS))
    words = f"lines: 95 % intervals; n = {max(row.score.num_examples for row in rows):,}; filled: the winner"
    if any(row.deviation is not None for row in rows):
        words += "; ±: sd of seeds"
    figure.text(LEFT, 0.13 / whole, words, va="center", **text_style(SMALL_POINTS, QUIET))
