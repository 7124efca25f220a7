"""Figures: gains and losses of every task beside its preference, trade-off fronts, comparisons, cosines."""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub_magmax.errors import OutputError
from hub_magmax.evaluation.scores import Score, Scores
from hub_magmax.evaluation.tradeoff import Tradeoff, task_tradeoffs
from hub_magmax.reporting.diagnosis import Diagnosis
from hub_magmax.reporting.score_formats import Unit
from hub_magmax.reporting.tradeoff_surface import Surface

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

#: Twice the width at which the Hub shows pictures on a phone: 4 inches, with text of 7 points or more.
DOTS_PER_INCH = 200

_WIDTH, _ROW, _TOP, _BOTTOM = 4.0, 0.44, 0.34, 0.46  # inches
_LEFT, _SPLIT, _RIGHT = 0.03, 0.74, 0.97  # of the width: scores between the first two, then the preference
_NAMES = 0.3  # of the width: where names stand to the left of what is measured
_LAYER_NAMES = 0.4  # likewise, of layers
_CELL = 0.16  # inches: a row of the heat map
_MAX_LAYERS, _MAX_PAIRS = 40, 15
_LABEL_POINTS, _SMALL_POINTS = 7.5, 7.0
_FONT = "DejaVu Sans"  # comes with matplotlib, so the picture is the same everywhere


@dataclass(frozen=True)
class _Series:
    """How one kind of model is drawn: the colours are Okabe and Ito's, and shapes differ too."""

    label: str
    colour: str
    marker: str
    offset: float  # in rows, below the row's top
    filled: bool = True
    size: float = 4.0  # points


_BASE = _Series("base model", "#666666", "s", 0.46, filled=False)
_OWN = _Series("own checkpoint", "#0072B2", "D", 0.63)
_MERGED = _Series("merged", "#D55E00", "o", 0.80)
_FRONT = replace(_MERGED, label="front", size=2.5)


def draw_tradeoff(scores: Scores, preference: Mapping[str, float], path: Path) -> None:
    """Write a PNG with each task's scores and 95 % intervals, and the requested preference.

    Args:
        scores: What was measured; tasks without a score keep their row.
        preference: By task, in the order of the rows.
        path: File to write.

    Raises:
        OutputError: If `path` cannot be written.
    """
    _write_figure(tradeoff_figure(scores, preference), path)


def tradeoff_figure(scores: Scores, preference: Mapping[str, float]) -> Figure:
    """Return the figure that `draw_tradeoff` writes; it belongs to no pyplot session."""
    height = _TOP + _ROW * len(preference) + _BOTTOM
    figure = _new_figure(height)
    bottom, tall = _BOTTOM / height, _ROW * len(preference) / height
    measured = figure.add_axes((_LEFT, bottom, _SPLIT - _LEFT, tall))
    wanted = figure.add_axes((_SPLIT + 0.03, bottom, _RIGHT - _SPLIT - 0.03, tall))
    for axes in (measured, wanted):
        _prepare(axes, len(preference))
    _draw_scores(measured, task_tradeoffs(scores, preference), scores.metric, Unit(scores.is_share))
    _draw_preference(wanted, preference)
    header = 1 - 0.5 * _TOP / height
    figure.text(_SPLIT + 0.03, header, "preference", va="center", **_text(_LABEL_POINTS))
    _add_legend(figure, (_BASE, _OWN, _MERGED), header)
    return figure


def draw_comparison(
    rows: Sequence[tuple[str, Score, bool]], metric: str, path: Path, *, is_share: bool
) -> None:
    """Write a PNG with one row per method: its score and 95 % interval, the winner filled.

    Args:
        rows: Label, score, and whether it won; from the top.
        metric: What the scores are.
        path: File to write.
        is_share: Show them in per cent.

    Raises:
        OutputError: If `path` cannot be written.
    """
    height = 0.1 + _ROW * len(rows) + _BOTTOM
    figure = _new_figure(height)
    axes = figure.add_axes((_LEFT, _BOTTOM / height, _RIGHT - _LEFT, _ROW * len(rows) / height))
    _prepare(axes, len(rows))
    unit = Unit(is_share)
    axes.grid(axis="x", color="#d9d9d9", linewidth=0.5, zorder=0.5)
    sizes = {score.num_examples for _, score, _ in rows}
    axes.set_xlabel(
        f"{unit.axis(metric)}, bars: 95 % interval, n = {max(sizes):,}; filled: the winner",
        parse_math=False,
        **_text(_SMALL_POINTS),
    )
    for number, (label, score, won) in enumerate(rows):
        series = replace(_MERGED, filled=won, offset=0.68)
        low, high, value = (unit.factor * v for v in (score.low, score.high, score.value))
        axes.hlines(number + series.offset, low, high, color=series.colour, linewidth=1.0, zorder=2)
        axes.plot([value], [number + series.offset], zorder=3, clip_on=False, **_marker(series))
        _label_row(axes, number, label, unit.value(score.value))
    _write_figure(figure, path)


def draw_front(surface: Surface, path: Path) -> None:
    """Write a PNG with the scores of every model on the front: a row per task, a line per model.

    Raises:
        OutputError: If `path` cannot be written.
    """
    _write_figure(front_figure(surface), path)


def front_figure(surface: Surface) -> Figure:
    """Return the figure that `draw_front` writes."""
    unit, rows = Unit(surface.is_share), len(surface.evaluated)
    height = _TOP + _ROW * rows + _BOTTOM
    figure = _new_figure(height)
    axes = figure.add_axes((_NAMES, _BOTTOM / height, _RIGHT - _NAMES, _ROW * rows / height))
    _prepare(axes, rows)
    shown = [surface.points[index] for index in surface.front]
    found = [*surface.base_model, *surface.own, *(score for point in shown for score in point.scores)]
    values = [replace(score, low=score.value, high=score.value) for score in found]
    axes.set_xlim(*(_limits(values) if unit.is_share else _free_limits(values)))
    axes.grid(axis="x", color="#d9d9d9", linewidth=0.5, zorder=0.5)
    axes.set_xlabel(
        f"{unit.axis(surface.metric)}, a line per model", parse_math=False, **_text(_SMALL_POINTS)
    )
    heights = [row + 0.5 for row in range(rows)]
    for point in shown:
        line = _places(point.scores, unit)
        axes.plot(line, heights, color=_MERGED.colour, linewidth=0.5, alpha=0.45, zorder=1.5)
        axes.plot(line, heights, zorder=2, clip_on=False, **_marker(_FRONT))
    for series, scores in ((_BASE, surface.base_model), (_OWN, surface.own)):
        axes.plot(_places(scores, unit), heights, zorder=3, clip_on=False, **_marker(series))
    for row, (task, score) in enumerate(zip(surface.evaluated, surface.base_model, strict=True)):
        _name_row(axes, row, task, f"n = {score.num_examples:,}")
    entries = (_BASE, _OWN, replace(_FRONT, label=f"front, {len(shown):,} of {len(surface.points):,}"))
    _add_legend(figure, entries, 1 - 0.5 * _TOP / height)
    return figure


def _places(scores: Sequence[Score], unit: Unit) -> list[float]:
    return [unit.factor * score.value for score in scores]


def draw_cosines(found: Diagnosis, path: Path) -> None:
    """Write a PNG with the cosine of every two task vectors in every layer.

    Raises:
        OutputError: If `path` cannot be written.
    """
    _write_figure(cosines_figure(found), path)


def cosines_figure(found: Diagnosis) -> Figure:
    """Return the figure that `draw_cosines` writes: a row per layer, a column per pair of tasks.

    With many tasks a column is one task, and shows its mean cosine with the others; with many layers a
    row is the mean of several.
    """
    columns, cells, names = _cosine_cells(found)
    above = 0.1 + max(map(_inches, columns))
    height = above + _CELL * len(cells) + 2 * _BOTTOM
    figure = _new_figure(height)
    place = (_LAYER_NAMES, 2 * _BOTTOM / height, _RIGHT - _LAYER_NAMES, _CELL * len(cells) / height)
    axes = figure.add_axes(place)
    image = axes.imshow(cells, cmap="PuOr", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.tick_params(length=0, pad=3)
    axes.set_yticks([])
    axes.set_xticks(range(len(columns)), columns, rotation=90, **_text(_SMALL_POINTS), parse_math=False)
    axes.xaxis.tick_top()
    bar = figure.add_axes((_LAYER_NAMES, 1.3 * _BOTTOM / height, _RIGHT - _LAYER_NAMES, 0.1 / height))
    figure.colorbar(image, cax=bar, orientation="horizontal")
    bar.tick_params(labelsize=_SMALL_POINTS, labelfontfamily=_FONT, length=2, pad=2)
    looked_at = f"n = {found.whole.num_looked_at:,} of {found.whole.num_elements:,} elements"
    words = f"cosine of two task vectors, {looked_at}"
    figure.text(_RIGHT, 0.3 * _BOTTOM / height, words, ha="right", va="center", **_text(_SMALL_POINTS))
    beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": "right"}
    for row, name in enumerate(names):
        label = axes.text(-0.02, row, name, **beside, **_text(_SMALL_POINTS), parse_math=False)
        _shorten_left(label, name, _LEFT * _WIDTH * DOTS_PER_INCH)
    return figure


def _inches(text: str) -> float:
    """Return how wide a small text is."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    drawn = TextPath((0, 0), text.replace("$", "S"), size=_SMALL_POINTS, prop=FontProperties(family=_FONT))
    return float(drawn.get_extents().width) / 72


def _cosine_cells(found: Diagnosis) -> tuple[list[str], list[list[float]], list[str]]:
    """Return the names of the columns, the cells by row, and the names of the rows."""
    tasks, count = [task[:14] for task in found.tasks], len(found.tasks)
    pairs = list(combinations(range(count), 2))
    blocks, names = _rows_of_layers(found)
    if not pairs:
        return tasks, [[1.0] for _ in blocks], names
    if len(pairs) <= _MAX_PAIRS:
        columns = [f"{tasks[one]}, {tasks[other]}" for one, other in pairs]
        return columns, [[float(block[pair]) for pair in pairs] for block in blocks], names
    means = [((block.sum(axis=1) - block.diagonal()) / (count - 1)).tolist() for block in blocks]
    return tasks, means, names


def _rows_of_layers(found: Diagnosis) -> tuple[list[np.ndarray], list[str]]:
    """Return the cosines of every layer, or the means of several that follow each other, and their names."""
    import numpy as np

    size = -(-len(found.layers) // _MAX_LAYERS)
    rows = [found.layers[start : start + size] for start in range(0, len(found.layers), size)]
    means = [np.mean([layer.cosines for layer in row], axis=0) for row in rows]
    return means, [row[0].name + (" …" if size > 1 else "") for row in rows]


def _name_row(axes: Axes, row: int, task: str, size: str) -> None:
    """Write a task's name and size to the left of its row; a long name is cut."""
    place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "parse_math": False}
    left = -(_NAMES - _LEFT) / (_RIGHT - _NAMES)
    name = axes.text(left, row + 0.3, task, **place, **_text(_LABEL_POINTS))
    axes.text(left, row + 0.72, size, color="#555555", **place, **_text(_SMALL_POINTS))
    _shorten(name, task, axes.get_window_extent().x0 - 0.05 * DOTS_PER_INCH)


def _shorten(label: Text, text: str, free: float) -> None:
    """Cut the end of a label until it ends left of `free`, in pixels."""
    cuts = [text, *(f"{text[:length]}…" for length in range(len(text) - 1, 0, -1))]
    _first_that_fits(label, cuts, lambda: label.get_window_extent().x1 <= free)


def _shorten_left(label: Text, text: str, free: float) -> None:
    """Cut the start of a label until it begins right of `free`, in pixels."""
    cuts = [text, *(f"…{text[start:]}" for start in range(1, len(text)))]
    _first_that_fits(label, cuts, lambda: label.get_window_extent().x0 >= free)


def _first_that_fits(label: Text, cuts: Sequence[str], fits: Callable[[], bool]) -> None:
    """Set the first of ever shorter texts that fits, or else the last."""

    def tried(number: int) -> bool:
        label.set_text(cuts[number])
        return fits()

    number = bisect_left(range(len(cuts)), True, key=tried)
    label.set_text(cuts[min(number, len(cuts) - 1)])


def _new_figure(height: float) -> Figure:
    """Return an empty figure, `height` inches tall, that belongs to no pyplot session."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _add_legend(figure: Figure, entries: Sequence[_Series], header: float) -> None:
    figure.legend(
        handles=[_legend_entry(series) for series in entries],
        loc="center left",
        bbox_to_anchor=(_LEFT - 0.03, header),
        ncols=len(entries),
        frameon=False,
        prop={"family": _FONT, "size": _LABEL_POINTS},
        handletextpad=0.1,
        columnspacing=1.0,
        borderaxespad=0.3,
    )


def _write_figure(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    try:
        path.write_bytes(content.getvalue())
    except OSError as error:
        raise OutputError(f"the picture cannot be written ({error.strerror})", where=str(path)) from error


def _prepare(axes: Axes, num_rows: int) -> None:
    axes.set_ylim(num_rows, 0)
    axes.set_yticks([])
    axes.set_facecolor("white")
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    for row in range(0, num_rows, 2):
        axes.axhspan(row, row + 1, color="#f2f2f2", zorder=0)
    axes.tick_params(axis="x", labelsize=_SMALL_POINTS, labelfontfamily=_FONT, length=2, pad=2)


def _draw_scores(axes: Axes, rows: tuple[Tradeoff, ...], metric: str, unit: Unit) -> None:
    found = [s for row in rows for s in (row.base, row.own, row.merged) if s is not None]
    axes.set_xlim(*(_limits(found) if unit.is_share else _free_limits(found)))
    axes.grid(axis="x", color="#d9d9d9", linewidth=0.5, zorder=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"{unit.axis(metric)}, bars: 95 % interval", parse_math=False, **_text(_SMALL_POINTS))
    for number, row in enumerate(rows):
        for series, score in ((_BASE, row.base), (_OWN, row.own), (_MERGED, row.merged)):
            if score is not None:
                _draw_score(axes, score, series, number + series.offset, unit)
        size = "not measured" if row.num_examples is None else f"n = {row.num_examples:,}"
        _label_row(axes, number, row.task, size)


def _draw_score(axes: Axes, score: Score, series: _Series, height: float, unit: Unit) -> None:
    value, low, high = (unit.factor * number for number in (score.value, score.low, score.high))
    axes.hlines(height, low, high, color=series.colour, linewidth=1.0, zorder=2)
    axes.plot([value], [height], zorder=3, clip_on=False, **_marker(series))


def _label_row(axes: Axes, row: int, task: str, size: str) -> None:
    place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "parse_math": False}
    right = axes.text(0.985, row + 0.22, size, ha="right", color="#555555", **place, **_text(_SMALL_POINTS))
    left = axes.text(0.015, row + 0.22, task, ha="left", **place, **_text(_LABEL_POINTS))
    _shorten(left, task, right.get_window_extent().x0 - 0.05 * DOTS_PER_INCH)


def _draw_preference(axes: Axes, preference: Mapping[str, float]) -> None:
    weights = list(preference.values())
    heights = [row + _OWN.offset for row in range(len(weights))]
    axes.set_xlim(0, max(*weights, 1e-9) * 1.05)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.barh(heights, weights, height=0.3, color="#009E73", zorder=2)
    axes.set_xlabel("sums to 1", labelpad=4, **_text(_SMALL_POINTS))
    for row, weight in enumerate(weights):
        place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
        axes.text(0.03, row + 0.22, f"{weight:.3g}", ha="left", **place, **_text(_LABEL_POINTS))


def _limits(scores: list[Score]) -> tuple[float, float]:
    """Return the part of 0 to 100 % that holds every interval: multiples of 10, with room for the marks."""
    lows = [100 * score.low for score in scores] or [0.0]
    highs = [100 * score.high for score in scores] or [100.0]
    return max(10 * (min(lows) // 10), 0.0) - 1.5, min(10 * (max(highs) // 10 + 1), 100.0) + 1.5


def _free_limits(scores: list[Score]) -> tuple[float, float]:
    """Return a range that holds every interval, with room for the marks."""
    low = min((score.low for score in scores), default=0.0)
    high = max((score.high for score in scores), default=1.0)
    margin = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
    return low - margin, high + margin


def _text(points: float) -> dict[str, Any]:
    return {"fontsize": points, "family": _FONT}


def _marker(series: _Series) -> dict[str, Any]:
    return {
        "color": series.colour,
        "marker": series.marker,
        "markersize": series.size,
        "markerfacecolor": series.colour if series.filled else "white",
        "markeredgewidth": 1.0,
        "linestyle": "none",
    }


def _legend_entry(series: _Series) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=series.label, **_marker(series))
