"""Figures: trade-offs of a merge, fronts of a sweep, comparisons of methods, similarity of checkpoints.

Each is written twice: as PNG, which all pages show, and as SVG, which follows the light or dark scheme of
the page and keeps its text as text.
"""

from hub_magmax.reporting.figures.comparison import Row, comparison_figure, draw_comparison
from hub_magmax.reporting.figures.front import draw_front, front_figure
from hub_magmax.reporting.figures.scales import Scale
from hub_magmax.reporting.figures.similarity import cosines_figure, draw_cosines
from hub_magmax.reporting.figures.tradeoff import draw_tradeoff, tradeoff_figure

__all__ = [
    "Row",
    "Scale",
    "comparison_figure",
    "cosines_figure",
    "draw_comparison",
    "draw_cosines",
    "draw_front",
    "draw_tradeoff",
    "front_figure",
    "tradeoff_figure",
]
