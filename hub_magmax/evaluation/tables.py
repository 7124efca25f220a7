"""Small tables of results, written as text, Markdown, CSV or LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

#: Forms of a table.
FORMATS = ("text", "markdown", "csv", "latex")
Format = Literal["text", "markdown", "csv", "latex"]

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%",
    "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "λ": r"$\lambda$",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
}  # fmt: skip

#: What Markdown, or the HTML in it, would take for more than text.
_MARKDOWN = "\\`*_[]<>|~&"


@dataclass(frozen=True)
class Measured:
    """A measured number with its interval, and its standard deviation over seeds where there are several."""

    value: float
    low: float
    high: float
    deviation: float | None = None

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:.3f}"
        return f"{self.value:.3f}{spread} [{self.low:.3f}, {self.high:.3f}]"


#: Text as it is, a number, a measured one, or nothing.
Cell = str | int | float | Measured | None


@dataclass(frozen=True)
class Table:
    """A head, rows of as many cells, and lines below.

    Attributes:
        head: Name of each column.
        rows: Cells; those of a column that holds text are on the left.
        notes: Sentences below; CSV is for programs, and leaves all sentences out.
        lead: Sentences above.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    lead: tuple[str, ...] = ()

    def write(self, form: Format = "text") -> str:
        """Return the table in one of `FORMATS`, without a line break at the end."""
        return {"text": self._text, "markdown": self._markdown, "csv": self._csv, "latex": self._latex}[
            form
        ]()

    def _text(self) -> str:
        cells = [self.head, *(tuple(map(_shown, row)) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        left = self._texts()
        lines = [
            "  ".join(
                cell.ljust(width) if is_left else cell.rjust(width)
                for cell, width, is_left in zip(row, widths, left, strict=True)
            ).rstrip()
            for row in cells
        ]
        above, below = ([*self.lead, ""] if self.lead else []), (["", *self.notes] if self.notes else [])
        return "\n".join([*above, *lines, *below])

    def _markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return f"| {' | '.join(cells)} |"

        rule = line([":---" if is_left else "---:" for is_left in self._texts()])
        rows = [
            line([_in_markdown(_shown(cell)) if isinstance(cell, str) else _shown(cell) for cell in row])
            for row in self.rows
        ]
        above = [part for note in self.lead for part in (_in_markdown(note), "")]
        below = [part for note in self.notes for part in ("", _in_markdown(note))]
        return "\n".join([*above, line([*map(_in_markdown, self.head)]), rule, *rows, *below])

    def _csv(self) -> str:
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        kinds = [self._parts(column) for column in range(len(self.head))]
        names = zip(self.head, kinds, strict=True)
        writer.writerow([f"{name} {part}".rstrip() for name, parts in names for part in parts])
        for row in self.rows:
            writer.writerow(
                [value for cell, parts in zip(row, kinds, strict=True) for value in _values(cell, parts)]
            )
        return stream.getvalue().rstrip("\n")

    def _latex(self) -> str:
        def row_of(cells: Sequence[str]) -> str:
            return f"{' & '.join(map(_in_latex, cells))} \\\\"

        columns = "".join("l" if is_left else "r" for is_left in self._texts())
        rows = [row_of([_shown(cell) for cell in row]) for row in self.rows]
        return "\n".join(
            [
                f"\\begin{{tabular}}{{{columns}}}",
                "\\hline",
                row_of(self.head),
                "\\hline",
                *rows,
                "\\hline",
                "\\end{tabular}",
                *(f"% {line}" for text in (*self.lead, *self.notes) for line in text.splitlines()),
            ]
        )

    def _texts(self) -> list[bool]:
        """Say of each column whether it holds text."""
        columns = ([row[number] for row in self.rows] for number in range(len(self.head)))
        return [all(isinstance(cell, str | None) for cell in column) for column in columns]

    def _parts(self, column: int) -> tuple[str, ...]:
        """Return the parts that a column has in CSV: a measured number is several."""
        measured = [row[column] for row in self.rows if isinstance(row[column], Measured)]
        if not measured:
            return ("",)
        drawn = any(isinstance(cell, Measured) and cell.deviation is not None for cell in measured)
        return ("", "low", "high", *(["sd"] if drawn else []))


def _values(cell: Cell, parts: Sequence[str]) -> Iterator[str]:
    """Yield a cell's values as CSV has them: numbers with ten digits."""
    measured = cell if isinstance(cell, Measured) else None
    single = measured.value if measured else cell
    by_part = {"": single}
    if isinstance(cell, Measured):
        by_part |= {"low": cell.low, "high": cell.high, "sd": cell.deviation}
    for part in parts:
        value = by_part.get(part)
        yield "" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.3f}" if isinstance(cell, float) else " ".join(str(cell).split())


def _in_markdown(text: str) -> str:
    return "".join(f"\\{sign}" if sign in _MARKDOWN else sign for sign in text)


def _in_latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))
