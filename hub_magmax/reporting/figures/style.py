"""Style of all figures: sizes, colours in both schemes, markers, and how wide texts are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

#: Twice the width at which the Hub shows pictures on a phone: 4 inches, with text of 7 points or more.
DOTS_PER_INCH = 200
WIDTH = 4.0

#: Of the width: the margins, and the end of the names where these stand to the left of the marks.
LEFT, NAMES, RIGHT = 0.03, 0.36, 0.97

#: Heights in inches: of the legend above, and of the axis and its title below.
TOP, BOTTOM = 0.34, 0.58

LABEL_POINTS, SMALL_POINTS = 7.5, 7.0
FONT = "DejaVu Sans"  # comes with matplotlib, so the picture is the same everywhere

PAGE, STRIPE, GRID, TEXT, QUIET = "#ffffff", "#f2f2f2", "#d9d9d9", "#1a1a1a", "#555555"
#: Of Okabe and Ito, but for the grey.
BASE, OWN, MERGED, WANTED = "#666666", "#0072b2", "#d55e00", "#009e73"

#: What an SVG shows in place of each colour where the page is dark.
DARK: Mapping[str, str] = MappingProxyType(
    {
        PAGE: "#14161a",
        STRIPE: "#1f2329",
        GRID: "#3a4049",
        TEXT: "#f0f1f3",
        QUIET: "#b6bac1",
        BASE: "#b0b0b0",
        OWN: "#6cbcf0",
        MERGED: "#ff9a57",
        WANTED: "#3ecf9f",
    }
)


@dataclass(frozen=True)
class Series:
    """How one kind of model is drawn: shapes differ as well as colours.

    Attributes:
        label: In the legend.
        offset: In rows, below the row's top.
        size: In points.
    """

    label: str
    colour: str
    marker: str
    offset: float = 0.5
    filled: bool = True
    size: float = 4.0

    @property
    def style(self) -> dict[str, Any]:
        """Arguments of matplotlib for marks without a line."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "markersize": self.size,
            "markerfacecolor": self.colour if self.filled else PAGE,
            "markeredgewidth": 1.0,
            "linestyle": "none",
            "clip_on": False,  # marks at the end of the axis are whole
        }

    @property
    def entry(self) -> Line2D:
        """Its entry in a legend."""
        from matplotlib.lines import Line2D

        return Line2D([], [], label=self.label, **self.style)


BASE_MODEL = Series("base model", BASE, "s", 0.46, filled=False)
OWN_CHECKPOINT = Series("own checkpoint", OWN, "D", 0.63)
MERGED_MODEL = Series("merged", MERGED, "o", 0.80)


def text_style(points: float, colour: str = TEXT) -> dict[str, Any]:
    """Return arguments of matplotlib for a text that is no mathematics."""
    return {"fontsize": points, "family": FONT, "color": colour, "parse_math": False}


@lru_cache(4096)
def inches(text: str, points: float) -> float:
    """Return how wide a text is."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    properties = FontProperties(family=FONT, size=points)
    return float(text_to_path.get_text_width_height_descent(text, properties, ismath=False)[0]) / 72


def new_figure(height: float) -> Figure:
    """Return an empty figure, `height` inches tall, that belongs to no pyplot session."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DOTS_PER_INCH, facecolor=PAGE)
    FigureCanvasAgg(figure)
    return figure


def add_axes(figure: Figure, left: float, right: float, bottom: float, height: float) -> Axes:
    """Return axes between two shares of the width, `bottom` inches above the end, `height` inches tall."""
    whole = figure.get_figheight()
    axes = figure.add_axes((left, bottom / whole, right - left, height / whole))
    axes.set_facecolor("none")
    axes.set_yticks([])
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    small = {"labelsize": SMALL_POINTS, "labelfontfamily": FONT, "length": 2, "pad": 2}
    axes.tick_params(axis="both", color=QUIET, labelcolor=TEXT, **small)
    return axes


def add_scale(axes: Axes, along: str, up: str) -> None:
    """Give axes a grid, a scale at the left, and titles of what goes along and up."""
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(color=GRID, linewidth=0.5)
    axes.spines["left"].set_visible(True)
    axes.spines["left"].set_color(QUIET)
    axes.set_xlabel(along, **text_style(SMALL_POINTS))
    axes.set_ylabel(up, **text_style(SMALL_POINTS))
    axes.tick_params(axis="y", labelcolor=TEXT)


def add_legend(figure: Figure, entries: Sequence[Line2D], middle: float, *, num_columns: int = 3) -> None:
    """Show what marks mean at the top left; the middle of the legend is a share of the height."""
    figure.legend(
        handles=entries,
        loc="center left",
        bbox_to_anchor=(LEFT - 0.03, middle),
        ncols=num_columns,
        frameon=False,
        prop={"family": FONT, "size": SMALL_POINTS},
        labelcolor=TEXT,
        handletextpad=0.3,
        handlelength=1.4,
        columnspacing=1.0,
        labelspacing=0.25,
        borderaxespad=0.3,
    )


def header_of(figure: Figure) -> float:
    """Return the height of the middle of the legend, as a share of the figure's."""
    return 1 - 0.5 * TOP / float(figure.get_figheight())
