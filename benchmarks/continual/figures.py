"""Pictures of one data set for docs/experiments.md: accuracy by preference, and regret by λ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.continual.rows import (
    Key,
    Results,
    accuracies,
    by_seed,
    is_measured,
    keys,
    mean,
    preference_of,
    scalings,
)
from benchmarks.continual.significance import paired
from hub_magmax.files import write_text
from hub_magmax.reporting.figures.style import (
    BASE,
    BASE_MODEL,
    GRID,
    MERGED,
    MERGED_MODEL,
    OWN,
    OWN_CHECKPOINT,
    QUIET,
    RIGHT,
    SMALL_POINTS,
    TOP,
    WANTED,
    Series,
    add_axes,
    add_legend,
    header_of,
    new_figure,
    text_style,
)
from hub_magmax.reporting.figures.writing import svg_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

#: Methods in the pictures; those that were measured are drawn.
SHOWN = (
    "last_task",
    "magmax",
    "average",
    "ties",
    "tunable_magmax algorithm-1",
    "tunable_magmax top-n",
    "agreement",
    "wudi",
    "regmean",
    "average, react",
)

#: Inches: one row, the axis below the rows, and a panel of curves.
_ROW, _BELOW, _CURVES = 0.2, 0.42, 1.9

#: Of the width: the ends of the names, and of the numbers beside curves.
_NAMES, _NUMBERS = 0.4, 0.13

#: Colour and line of the curves.
_LINES = {
    "tunable_magmax algorithm-1": (MERGED, "-"),
    "tunable_magmax top-n": (MERGED, "--"),
    "agreement": (OWN, "-"),
    "average": (BASE, "-"),
    "ties": (WANTED, "-"),
}


def draw(parts: Mapping[str, Results], folder: Path, name: str) -> list[tuple[str, str]]:
    """Write the pictures of a data set, and return their names and titles.

    Args:
        parts: Families by their number of tasks.
        folder: Where they are written, as SVG for light and dark pages.
        name: Of the data set; both files begin with it.
    """
    found = []
    for kind, svg, title in (
        ("accuracy", accuracy_svg(parts), "accuracy of methods by preference, with intervals over seeds"),
        ("regret", regret_svg(parts), "points lost to the best fixed choice, by scaling coefficient"),
    ):
        file = f"{name}_{kind}.svg"
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / file, svg)
        found.append((file, title))
    return found


def accuracy_svg(parts: Mapping[str, Results]) -> str:
    """Return accuracy with λ tuned by method and preference, with 95 % intervals over seeds."""
    panels = {number: _ordered(results) for number, results in parts.items()}
    figure = new_figure(TOP + sum(_ROW * len(rows) + _BELOW for rows in panels.values()))
    bottom = figure.get_figheight() - TOP
    kinds: dict[str, Series] = {}
    for number, methods in panels.items():
        bottom -= _ROW * len(methods) + _BELOW
        axes = add_axes(figure, _NAMES, RIGHT, bottom + _BELOW, _ROW * len(methods))
        kinds |= _draw_rows(axes, parts[number], methods)
        axes.set_xlabel(f"T = {number}: accuracy, per cent", **text_style(SMALL_POINTS))
    add_legend(figure, [series.entry for series in kinds.values()], header_of(figure))
    return svg_text(figure, "Accuracy of methods by preference")


def _ordered(results: Results) -> list[str]:
    """Return the methods that are shown and were measured, the best of their preferences first."""
    found = {method: [key for key in keys(results) if key[0] == method] for method in SHOWN}
    best = {
        method: max(mean(by_seed(results, key, "tuned")) for key in own)
        for method, own in found.items()
        if own
    }
    return sorted(best, key=lambda method: -best[method])


def _draw_rows(axes: Axes, results: Results, methods: Sequence[str]) -> dict[str, Series]:
    kind = preference_of(results)
    looks = {"uniform": BASE_MODEL, "transport": OWN_CHECKPOINT, kind: MERGED_MODEL}
    found = {
        name: Series(name, series.colour, series.marker, offset, filled=series.filled, size=3.0)
        for (name, series), offset in zip(looks.items(), (-0.22, 0.0, 0.22), strict=False)
    }
    axes.set_ylim(len(methods) - 0.5, -0.5)
    for place, method in enumerate(methods):
        axes.axhline(place, color=GRID, linewidth=0.5, zorder=0)
        for name, series in found.items():
            if is_measured(results, (method, name)):
                test = paired(by_seed(results, (method, name), "tuned"))
                ends = test.interval or (test.difference, test.difference)
                height = place + series.offset
                axes.plot([100 * end for end in ends], [height] * 2, color=series.colour, linewidth=1.0)
                axes.plot([100 * test.difference], [height], **series.style)
    axes.set_yticks(range(len(methods)), methods)
    axes.tick_params(axis="y", length=0)
    return found


def regret_svg(parts: Mapping[str, Results]) -> str:
    """Return what methods lose at each λ to the best fixed choice of all rows, with 95 % intervals."""
    figure = new_figure(2 * TOP + len(parts) * (_CURVES + _BELOW))
    bottom = figure.get_figheight() - 2 * TOP
    lines: dict[str, Line2D] = {}
    for number, results in parts.items():
        bottom -= _CURVES + _BELOW
        axes = add_axes(figure, _NUMBERS, RIGHT, bottom + _BELOW, _CURVES)
        lines |= _draw_curves(axes, results)
        axes.set_xlabel(f"T = {number}, {preference_of(results)}: λ", **text_style(SMALL_POINTS))
        axes.set_ylabel("points lost", **text_style(SMALL_POINTS))
    add_legend(figure, [*lines.values()], 1 - TOP / float(figure.get_figheight()), num_columns=2)
    return svg_text(figure, "Points lost to the best fixed choice, by scaling coefficient")


def _draw_curves(axes: Axes, results: Results) -> dict[str, Line2D]:
    every = {key: _by_scaling(results, key) for key in keys(results)}
    best = max((curve for own in every.values() for curve in own.T), key=lambda curve: curve.mean())
    kind = preference_of(results)
    found: dict[str, Line2D] = {}
    for method in _LINES:
        if (method, kind) in every:
            found[method] = _draw_curve(axes, method, scalings(results), best - every[method, kind].T)
    _style_curves(axes)
    return found


def _draw_curve(axes: Axes, method: str, places: Sequence[float], lost: np.ndarray) -> Line2D:
    """Draw points lost by scaling coefficient and seed: means, and their intervals."""
    colour, line = _LINES[method]
    tests = [paired(own.tolist()) for own in lost]
    middles = [100 * test.difference for test in tests]
    (curve,) = axes.plot(places, middles, color=colour, linestyle=line, linewidth=1.2, label=method)
    for place, test in zip(places, tests, strict=True):
        low, high = test.interval or (test.difference, test.difference)
        axes.plot([place, place], [100 * low, 100 * high], color=colour, linewidth=0.6)
    return curve


def _style_curves(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(color=GRID, linewidth=0.5)
    axes.spines["left"].set_visible(True)
    axes.spines["left"].set_color(QUIET)


def _by_scaling(results: Results, key: Key) -> np.ndarray:
    """Return accuracy by seed and scaling coefficient."""
    return np.array([accuracies(result, key).mean(axis=0) for result in results])
