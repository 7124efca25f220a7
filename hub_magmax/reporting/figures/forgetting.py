"""Picture of forgetting: the score of each task after it and after every later task, and their average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub_magmax.reporting.figures.scales import Scale
from hub_magmax.reporting.figures.style import (
    BASE,
    MERGED,
    OWN,
    SMALL_POINTS,
    WANTED,
    WIDTH,
    add_axes,
    add_legend,
    add_scale,
    header_of,
    inches,
    new_figure,
)
from hub_magmax.reporting.figures.writing import write_figure
from hub_magmax.text import cut_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_HEIGHT, _LEFT = 3.2, 0.13
_STYLES = [
    {"color": colour, "linestyle": style} for style in ("-", "--", ":") for colour in (OWN, WANTED, BASE)
]

#: Most tasks that are named; of more, only the average stands in the legend.
_MOST_NAMED = 7


def draw_forgetting(scores: Mapping[str, Mapping[str, float]], scale: Scale, path: Path) -> tuple[Path, Path]:
    """Write a picture of the scores while a sequence of tasks was learned.

    Args:
        scores: After each task, in order, the score of each task so far.
        scale: Of the scores.
        path: PNG to write; an SVG is written beside it.

    Raises:
        OutputError: If they cannot be written.
    """
    return write_figure(forgetting_figure(scores, scale), path, "scores of every task after every task")


def forgetting_figure(scores: Mapping[str, Mapping[str, float]], scale: Scale) -> Figure:
    """Return the figure that `draw_forgetting` writes."""
    figure = new_figure(_HEIGHT)
    axes = _axes(figure, list(scores), scale)

    def draw(label: str, values: Iterable[float | None], **style: Any) -> Line2D:
        known = [(place, scale.shown(value)) for place, value in enumerate(values) if value is not None]
        places, heights = zip(*known, strict=True)
        label = cut_name(label, lambda text: inches(text, SMALL_POINTS) <= 0.7)
        (line,) = axes.plot(places, heights, label=label, **style)
        return line

    tasks = list(dict.fromkeys(task for row in scores.values() for task in row))
    entries = [
        draw(
            task,
            (row.get(task) for row in scores.values()),
            marker="o",
            markersize=2.5,
            linewidth=1.0,
            **style,
        )
        for task, style in zip(tasks, cycle(_STYLES), strict=False)
    ]
    means = (sum(row.values()) / len(row) if row else None for row in scores.values())
    average = draw("average", means, color=MERGED, linewidth=2.0)
    shown = [average, *(entries if len(entries) <= _MOST_NAMED else [])]
    add_legend(figure, shown, header_of(figure), num_columns=4)
    return figure


def _axes(figure: Figure, names: Sequence[str], scale: Scale) -> Axes:
    """Return axes of the tasks in order, and of scores."""
    room = min(1.1, 3.2 / len(names))
    labels = [cut_name(name, lambda text: inches(text, SMALL_POINTS) <= room) for name in names]
    right = 1 - (inches(labels[-1], SMALL_POINTS) / 2 + 0.05) / WIDTH  # half of the last label stands there
    axes = add_axes(figure, _LEFT, min(0.97, right), 0.58, _HEIGHT - 0.58 - 0.5)
    axes.set_xticks(range(len(names)))
    axes.set_xticklabels(labels)
    add_scale(axes, "after learning", scale.title(2.0))
    return axes
