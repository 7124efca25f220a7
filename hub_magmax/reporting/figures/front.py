"""Picture of a sweep: for every task, its score in each model over the weight that the preference gave it.

Each task has a panel of its own, with the scores of the base model and of its own checkpoint as lines across:
the picture reads alike for three models and for a hundred.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hub_magmax.reporting.figures.scales import Scale
from hub_magmax.reporting.figures.style import (
    BASE,
    BASE_MODEL,
    GRID,
    LEFT,
    MERGED,
    MERGED_MODEL,
    OWN,
    OWN_CHECKPOINT,
    QUIET,
    RIGHT,
    SMALL_POINTS,
    TEXT,
    WIDTH,
    Series,
    add_axes,
    add_legend,
    inches,
    new_figure,
    text_style,
)
from hub_magmax.reporting.figures.writing import write_figure
from hub_magmax.reporting.tradeoff_surface import Surface
from hub_magmax.text import cut_names, number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Of the width: the end of the numbers to the left of the first panel. Inches between panels.
_NUMBERS, _BETWEEN = 0.11, 0.1

#: Inches: the legend, a panel of few and of many tasks, its name, and what stands below the last one.
_ABOVE, _PANEL, _SMALL_PANEL, _NAME, _BELOW = 0.42, 0.95, 0.62, 0.19, 0.58

#: Panels at most, tasks whose weights are drawn as they are, and weights that the axis names.
_MOST_PANELS, _FEW_TASKS, _TICKS = 40, 4, (0, 0.1, 0.5, 1)

#: Marks: of models on the front, of others, and around the one that is best for the recipe's own weights.
_FRONT = replace(MERGED_MODEL, label="front", size=2.6)
_OTHER = Series("other", QUIET, "o", filled=False, size=2.2)
_BEST = Series("best for the recipe", TEXT, "o", size=6.0)

#: Around the recipe's own preference, where it was measured and is not the best.
_ASKED = Series("the recipe's own", TEXT, "s", size=5.0)

#: Lines across a panel.
_BASE_LINE: dict[str, Any] = {"color": BASE, "linestyle": (0, (3, 2)), "linewidth": 1.0}
_OWN_LINE: dict[str, Any] = {"color": OWN, "linestyle": "-", "linewidth": 1.0}


def draw_front(surface: Surface, path: Path) -> tuple[Path, Path]:
    """Write a picture with the scores of every model by the weight of each task, those of the front filled.

    Raises:
        OutputError: If it cannot be written.
    """
    title = f"{surface.metric} of {number_of(len(surface.points), 'model')} by the weight of each task"
    return write_figure(front_figure(surface), path, title)


def front_figure(surface: Surface) -> Figure:
    """Return the figure that `draw_front` writes."""
    tasks = _order(surface)[:_MOST_PANELS]
    columns = _num_columns(len(tasks))
    rows = -(-len(tasks) // columns)
    tall = _SMALL_PANEL if columns > 3 else _PANEL
    figure = new_figure(_ABOVE + rows * (tall + _NAME) + _BELOW)
    width = ((RIGHT - _NUMBERS) * WIDTH - (columns - 1) * _BETWEEN) / columns
    scale = Scale(surface.metric, surface.is_share, surface.unit)
    names = cut_names(
        [surface.evaluated[task] for task in tasks], lambda text: inches(text, SMALL_POINTS) <= width
    )
    for number, (task, name) in enumerate(zip(tasks, names, strict=True)):
        row, column = divmod(number, columns)
        left = _NUMBERS + column * (width + _BETWEEN) / WIDTH
        bottom = _BELOW + (rows - 1 - row) * (tall + _NAME)
        axes = add_axes(figure, left, left + width / WIDTH, bottom, tall)
        _draw_panel(axes, surface, task, scale)
        axes.text(0, 1 + 0.03 / tall, name, transform=axes.transAxes, va="bottom", **text_style(SMALL_POINTS))
        axes.tick_params(labelleft=column == 0, labelbottom=number + columns >= len(tasks))
    _add_legend(figure, surface)
    _say_below(figure, surface, scale)
    return figure


def _order(surface: Surface) -> list[int]:
    """Return the evaluated tasks by number: those that the recipe wants most first."""
    wanted = dict(zip(surface.tasks, surface.wanted, strict=True)) if surface.wanted else {}
    return sorted(range(len(surface.evaluated)), key=lambda task: -wanted.get(surface.evaluated[task], 0.0))


def _num_columns(count: int) -> int:
    if count <= 4:
        return (1, 2, 3, 2)[count - 1]
    return 3 if count <= 12 else 4


def _across(surface: Surface) -> Callable[[float], float]:
    """Return where weights are drawn: those of more than four tasks, mostly small ones, by their roots."""
    return math.sqrt if len(surface.tasks) > _FEW_TASKS else float


def _draw_panel(axes: Axes, surface: Surface, task: int, scale: Scale) -> None:
    """Draw the scores of one task over its weight."""
    _set_ends(axes, surface, scale)
    for score, line in ((surface.base_model[task], _BASE_LINE), (surface.own[task], _OWN_LINE)):
        axes.axhline(scale.shown(score.value), zorder=1, **line)
    name, across = surface.evaluated[task], _across(surface)
    x = np.array([across(point.weights[surface.tasks.index(name)]) for point in surface.points])
    y = np.array([scale.shown(point.scores[task].value) for point in surface.points])
    deviations = np.array([scale.shown(point.deviation(name) or 0.0) for point in surface.points])
    if deviations.any():
        axes.vlines(x, y - deviations, y + deviations, color=MERGED, linewidth=0.8, zorder=2)
    others = np.setdiff1d(np.arange(len(x)), surface.front)
    axes.plot(x[others], y[others], zorder=3, **_OTHER.style)
    axes.plot(x[[*surface.front]], y[[*surface.front]], zorder=4, **_FRONT.style)
    for index, mark in _ringed(surface).items():
        axes.plot(x[index], y[index], zorder=5, **mark.style | {"markerfacecolor": "none"})


def _ringed(surface: Surface) -> dict[int, Series]:
    """Return the points that have a mark around them, by index; one that is both is the best."""
    marks = ((surface.asked, _ASKED), (surface.best, _BEST))
    return {index: mark for index, mark in marks if index is not None}


def _set_ends(axes: Axes, surface: Surface, scale: Scale) -> None:
    """Give every panel the same ends: weights from 0 to 1, and scores that hold those of all models."""
    from matplotlib.ticker import MaxNLocator

    merged = (score for point in surface.points for score in point.scores)
    every = [*surface.base_model, *surface.own, *merged]
    ticks = {f"{weight:g}".removeprefix("0") or "0": _across(surface)(weight) for weight in _TICKS}
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(*scale.limits([replace(score, low=score.value, high=score.value) for score in every]))
    axes.set_xticks([*ticks.values()], [*ticks])
    axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    axes.grid(color=GRID, linewidth=0.5, zorder=0.5)
    axes.set_axisbelow(True)


def _add_legend(figure: Figure, surface: Surface) -> None:
    from matplotlib.lines import Line2D

    front = f"front, {len(surface.front):,} of {len(surface.points):,}"
    others = [_OTHER] if len(surface.front) < len(surface.points) else []
    handles = [
        Line2D([], [], label=BASE_MODEL.label, **_BASE_LINE),
        Line2D([], [], label=OWN_CHECKPOINT.label, **_OWN_LINE),
        *(Line2D([], [], label=one.label, **one.style) for one in (replace(_FRONT, label=front), *others)),
        *(
            Line2D([], [], label=one.label, **one.style | {"markerfacecolor": "none"})
            for one in _ringed(surface).values()
        ),
    ]
    add_legend(figure, handles, 1 - 0.5 * (_ABOVE - 0.02) / float(figure.get_figheight()), num_columns=3)


def _say_below(figure: Figure, surface: Surface, scale: Scale) -> None:
    tall = float(figure.get_figheight())
    title = f"up: {scale.title((RIGHT - LEFT) * WIDTH - 0.2)}"
    figure.text(LEFT, 0.29 / tall, title, va="center", **text_style(SMALL_POINTS))
    root = "" if len(surface.tasks) <= _FEW_TASKS else " (by its root)"
    across = f"across: weight of the panel's task{root}; a dot is a model"
    if any(point.by_seed for point in surface.points):
        across += "; bars: sd of seeds"
    if (left := len(surface.evaluated) - _MOST_PANELS) > 0:
        across += f"; {number_of(left, 'task')} left out"
    figure.text(LEFT, 0.12 / tall, across, va="center", **text_style(SMALL_POINTS, QUIET))
