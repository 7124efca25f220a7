"""Figures as files: a PNG, and an SVG for light and dark pages; the same values give the same bytes."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from hub_magmax.files import write_bytes
from hub_magmax.recipe.result_files import picture_paths
from hub_magmax.reporting.figures.style import DARK, FONT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Fonts as wide as the one that texts were measured with, where that is not installed.
_FONTS = f"'{FONT}', 'Bitstream Vera Sans', Verdana, sans-serif"


@dataclass(frozen=True)
class Picture:
    """A figure as the bytes of a PNG, which notebooks show, and as the text of an SVG."""

    png: bytes = field(repr=False)
    svg: str = field(repr=False)
    title: str

    @classmethod
    def of(cls, figure: Figure, title: str) -> Picture:
        content = io.BytesIO()
        figure.savefig(content, format="png", metadata={"Software": None})
        return cls(content.getvalue(), svg_text(figure, title), title)

    def _repr_png_(self) -> bytes:
        return self.png


def write_figure(figure: Figure, path: Path, title: str) -> tuple[Path, Path]:
    """Write a PNG, and beside it an SVG of the same name, and return where.

    Args:
        figure: Drawn with the colours of `style` alone.
        path: Of the PNG.
        title: What is seen, for those who do not see it.

    Raises:
        OutputError: If they cannot be written.
    """
    picture = Picture.of(figure, title)
    paths = picture_paths(path)
    for file, content in zip(paths, (picture.png, picture.svg.encode()), strict=True):
        write_bytes(file, content)
    return paths


def svg_text(figure: Figure, title: str) -> str:
    """Return a figure as SVG, with text as text, whose colours follow the scheme of the page."""
    from matplotlib import rc_context

    content = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hub_magmax"}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", content.getvalue(), count=1, flags=re.DOTALL)
    text = re.sub(r"<!DOCTYPE.*?>\s*", "", text, count=1, flags=re.DOTALL)
    text = text.replace(f"'{FONT}'", _FONTS)
    head = f'<title>{escape(title)}</title>\n <style type="text/css">{_dark_rules()}</style>'
    return re.sub(r"(<svg[^>]*)>", lambda found: f'{found[1]} role="img">\n {head}', text, count=1)


def _dark_rules() -> str:
    """Return rules that replace each colour of an element's own style."""
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    )
    return f"@media (prefers-color-scheme: dark){{{rules}}}"
