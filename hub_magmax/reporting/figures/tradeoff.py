"""Picture of the card: the scores of every task's three models, and how much each task was to matter.

The most preferred task comes first. Up to a dozen tasks have their name above their marks. More have rows of
one line with the name beside them, and the axis above as well. Of more than 40 the most preferred are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hub_magmax.evaluation.scores import Scores
from hub_magmax.evaluation.tradeoff import Tradeoff, task_tradeoffs
from hub_magmax.reporting.figures.rows import (
    MOST_ROWS,
    MOST_SLIM_ROWS,
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
    BASE_MODEL,
    BOTTOM,
    GRID,
    LABEL_POINTS,
    LEFT,
    MERGED_MODEL,
    NAMES,
    OWN_CHECKPOINT,
    QUIET,
    RIGHT,
    SMALL_POINTS,
    TOP,
    WANTED,
    WIDTH,
    add_axes,
    add_legend,
    header_of,
    inches,
    new_figure,
    text_style,
)
from hub_magmax.reporting.figures.writing import write_figure
from hub_magmax.text import cut_names, number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SERIES = (BASE_MODEL, OWN_CHECKPOINT, MERGED_MODEL)

#: Of the width: the end of the scores, and the start of the preference.
_SPLIT, _WANTED = 0.74, 0.77

#: Inches of slim rows above the first, for the numbers of the axis.
_NUMBERS = 0.17


def draw_tradeoff(scores: Scores, preference: Mapping[str, float], path: Path) -> tuple[Path, Path]:
    """Write a picture with each task's scores and 95 % intervals, and the requested preference.

    Args:
        scores: What was measured; tasks without a score keep their row.
        preference: By task.
        path: PNG to write; an SVG is written beside it.

    Raises:
        OutputError: If they cannot be written.
    """
    title = "Scores of the base model, of each task's own checkpoint and of the merged model, by task"
    return write_figure(tradeoff_figure(scores, preference), path, title)


def tradeoff_figure(scores: Scores, preference: Mapping[str, float]) -> Figure:
    """Return the figure that `draw_tradeoff` writes; it belongs to no pyplot session."""
    everything = sorted(task_tradeoffs(scores, preference), key=lambda row: -row.preference)
    rows = everything[:MOST_SLIM_ROWS]
    is_slim = len(rows) > MOST_ROWS
    tall = (SLIM_ROW if is_slim else ROW) * len(rows)
    figure = new_figure(TOP + is_slim * _NUMBERS + tall + BOTTOM)
    measured = add_axes(figure, NAMES if is_slim else LEFT, _SPLIT, BOTTOM, tall)
    wanted = add_axes(figure, _WANTED, RIGHT, BOTTOM, tall)
    for axes in (measured, wanted):
        add_rows(axes, len(rows))
    scale = Scale.of(scores)
    found = (score for row in rows for score in (row.base, row.own, row.merged))
    measured.set_xlim(*scale.limits([*filter(None, found)]))
    (_draw_slim if is_slim else _draw_roomy)(measured, rows, scale)
    _draw_preference(wanted, [row.preference for row in rows], is_slim=is_slim)
    add_legend(figure, [series.entry for series in _SERIES], header_of(figure))
    figure.text(_WANTED, header_of(figure), "preference", va="center", **text_style(LABEL_POINTS))
    _say_below(figure, scale, everything, is_slim=is_slim)
    return figure


def _draw_roomy(axes: Axes, rows: Sequence[Tradeoff], scale: Scale) -> None:
    """Draw the three models of a task below each other, under its name and number of examples."""
    sizes = ["not measured" if row.num_examples is None else f"n = {row.num_examples:,}" for row in rows]
    room = (_SPLIT - LEFT) * WIDTH * 0.97 - max(inches(size, SMALL_POINTS) for size in sizes) - 0.08
    names = cut_names([row.task for row in rows], lambda text: inches(text, LABEL_POINTS) <= room)
    for number, (row, name, size) in enumerate(zip(rows, names, sizes, strict=True)):
        for series, score in zip(_SERIES, (row.base, row.own, row.merged), strict=True):
            if score is not None:
                draw_score(axes, score, series, number, scale)
        axes.text(0.015, number + 0.22, name, ha="left", **place(axes), **text_style(LABEL_POINTS))
        axes.text(0.985, number + 0.22, size, ha="right", **place(axes), **text_style(SMALL_POINTS, QUIET))


def _draw_slim(axes: Axes, rows: Sequence[Tradeoff], scale: Scale) -> None:
    """Draw the three models of a task on one line, joined, with the interval of the merged one."""
    repeat_axis(axes)
    write_names(axes, [row.task for row in rows])
    for number, row in enumerate(rows):
        found = [scale.shown(score.value) for score in (row.base, row.own, row.merged) if score]
        if not found:
            axes.text(0.5, number + 0.5, "not measured", ha="center", **place(axes), **text_style(7.0, QUIET))
            continue
        axes.hlines(number + 0.5, min(found), max(found), color=GRID, linewidth=1.5, zorder=1)
        for series, score in zip(_SERIES, (row.base, row.own, row.merged), strict=True):
            if score is not None:
                slim = replace(series, offset=0.5, size=3.2)
                draw_score(axes, score, slim, number, scale, has_interval=series is MERGED_MODEL)


def _draw_preference(axes: Axes, weights: Sequence[float], *, is_slim: bool) -> None:
    """Draw weights as numbers and bars: below the numbers, or to the right of them."""
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    largest = max(*weights, 1e-9)
    axes.set_xlim(-1.1 * largest if is_slim else 0.0, 1.05 * largest)
    first, tall = (0.5, 0.5) if is_slim else (OWN_CHECKPOINT.offset, 0.3)
    axes.barh([row + first for row in range(len(weights))], weights, height=tall, color=WANTED, zorder=2)
    for row, weight in enumerate(weights):
        shown = _short(weight) if is_slim else f"{weight:.3g}"
        height = row + (0.5 if is_slim else 0.22)
        axes.text(0.03, height, shown, ha="left", **place(axes), **text_style(SMALL_POINTS))


def _short(weight: float) -> str:
    """Return a weight with three decimals."""
    return f"{weight:.3f}" if weight == 0 or weight >= 0.0005 else "< .001"


def _say_below(figure: Figure, scale: Scale, rows: Sequence[Tradeoff], *, is_slim: bool) -> None:
    """Say in two lines what is measured, on how many examples, and what is not drawn."""
    tall = float(figure.get_figheight())
    title = scale.title((_WANTED - LEFT) * WIDTH - 0.05)
    figure.text(LEFT, 0.30 / tall, title, va="center", **text_style(SMALL_POINTS))
    lines = "line: 95 % interval of merged" if is_slim else "lines: 95 % intervals"
    sizes = {row.num_examples for row in rows if row.num_examples is not None}
    if is_slim and sizes:
        lines += f"; n = {min(sizes):,}" + (f" to {max(sizes):,}" if len(sizes) > 1 else "")
    if (left := len(rows) - MOST_SLIM_ROWS) > 0:
        lines += f"; {number_of(left, 'less preferred task')} left out"
    figure.text(LEFT, 0.13 / tall, lines, va="center", **text_style(SMALL_POINTS, QUIET))
    largest = max(row.preference for row in rows)
    bar = f"full bar: {largest:.3g}"
    figure.text(_WANTED, 0.30 / tall, bar, va="center", **text_style(SMALL_POINTS, QUIET))
