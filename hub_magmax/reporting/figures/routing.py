"""Picture of a router: accuracy by the share of examples that is escalated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hub_magmax.reporting.figures.style import (
    BASE,
    MERGED,
    OWN,
    QUIET,
    SMALL_POINTS,
    WANTED,
    add_axes,
    add_legend,
    add_scale,
    header_of,
    new_figure,
    text_style,
)
from hub_magmax.reporting.figures.writing import write_figure
from hub_magmax.reporting.router_report import RouterReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEIGHT, _LEFT = 3.2, 0.13


def draw_routing(report: RouterReport, path: Path) -> tuple[Path, Path]:
    """Write a picture of a router's cost–quality curve beside that of chance and of an oracle.

    Args:
        report: What was measured.
        path: PNG to write; an SVG is written beside it.

    Raises:
        OutputError: If they cannot be written.
    """
    return write_figure(routing_figure(report), path, "accuracy by the share of examples that is escalated")


def routing_figure(report: RouterReport) -> Figure:
    """Return the figure that `draw_routing` writes."""
    from matplotlib.lines import Line2D

    figure = new_figure(_HEIGHT)
    axes = add_axes(figure, _LEFT, 0.97, 0.58, _HEIGHT - 0.58 - 0.45)
    shares = [100 * point.share for point in report.costs]

    def draw(label: str, values: Sequence[float], colour: str, style: str) -> Line2D:
        (line,) = axes.plot(
            shares,
            [100 * value for value in values],
            color=colour,
            linestyle=style,
            linewidth=1.2,
            label=label,
        )
        return line

    entries = [
        draw("router", [point.router.value for point in report.costs], MERGED, "-"),
        draw("by confidence", [point.confidence for point in report.costs], WANTED, "--"),
        draw("at random", [point.random for point in report.costs], BASE, ":"),
        draw("oracle", [point.oracle for point in report.costs], OWN, "-."),
    ]
    low, high = ([100 * getattr(point.router, end) for point in report.costs] for end in ("low", "high"))
    for ends in (low, high):
        axes.plot(shares, ends, color=MERGED, linewidth=0.5)
    axes.axhline(100 * report.by_task.value, color=QUIET, linewidth=0.6)
    at = report.operation
    axes.plot(
        [100 * at.escalated.value],
        [100 * at.accuracy.value],
        marker="o",
        color=MERGED,
        markersize=5,
        linestyle="none",
    )
    axes.set_xlim(0, 100)
    add_scale(axes, "escalated, % of the examples", "right answers, %")
    marks = "point: the threshold; grey: own checkpoint; thin: 95 % interval"
    below = f"{marks}; n = {report.parts['held_out']:,}"
    figure.text(0.03, 0.13 / _HEIGHT, below, va="center", **text_style(SMALL_POINTS, QUIET))
    add_legend(figure, entries, header_of(figure), num_columns=4)
    return figure
