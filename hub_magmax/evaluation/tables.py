"""Small tables of results, written as text, Markdown, CSV or LaTeX."""

from __future__ import annotations

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Literal

from hub_magmax.errors import ArgumentError
from hub_magmax.text import Brief, aligned

if TYPE_CHECKING:
    import pandas

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


@dataclass(frozen=True)
class Shown:
    """A cell that people read otherwise than programs, which get the value as it is.

    Attributes:
        value: Of the same type as the others of its column, or None.
        text: What stands in a table for people.
    """

    value: str | float | Measured | None
    text: str


#: Text as it is, a number, a measured one, one of these with a text of its own, or nothing.
Cell = str | int | float | Measured | Shown | None


@dataclass(frozen=True)
class Table:
    """A head, rows of as many cells, and lines below.

    Attributes:
        head: Name of each column.
        rows: Cells; those of a column that holds text are on the left.
        notes: Sentences below; CSV is for programs, and leaves all sentences out.
        lead: Sentences above.
        is_drawn: Measured numbers may have a deviation, so that CSV has a column for it, empty or not.
        measured: Columns of measured numbers, of which there may be none: CSV has the same columns then.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    lead: tuple[str, ...] = ()
    is_drawn: bool = False
    measured: tuple[str, ...] = ()

    def write(self, form: Format = "text") -> str:
        """Return the table in one of `FORMATS`, without a line break at the end.

        Raises:
            ArgumentError: If there is no such form.
        """
        writers = {"text": self._text, "markdown": self._markdown, "csv": self._csv, "latex": self._latex}
        if not isinstance(form, str) or form not in writers:
            hint = "A notebook shows the result itself as HTML." if str(form) == "html" else ""
            raise ArgumentError(
                f"there is no form {form!r} of a table", expected=f"one of {', '.join(FORMATS)}", hint=hint
            )
        return writers[form]()

    # Complex only by count: a comprehension each for kinds, names and values.
    def to_frame(self) -> pandas.DataFrame:
        """Return the rows as pandas has them, a measured number in columns of its own as in CSV."""
        import pandas

        kinds = [self._parts(column) for column in range(len(self.head))]
        names = [f"{n} {part}".rstrip() for n, parts in zip(self.head, kinds, strict=True) for part in parts]
        rows = (zip(row, kinds, strict=True) for row in self.rows)
        values = [[value for cell, parts in row for value in _parts_of(cell, parts)] for row in rows]
        parts = (f"{n} {part}" for n, parts in zip(self.head, kinds, strict=True) for part in parts if part)
        # Numbers even where there are none: pandas takes a column of None for objects.
        return pandas.DataFrame(values, columns=names).astype(dict.fromkeys(parts, "float64"))

    def _repr_html_(self) -> str:
        """Return the table as notebooks show it."""
        sides = ["left" if is_left else "right" for is_left in self._texts()]

        def row_of(cells: Sequence[str], tag: str) -> str:
            pairs = zip(cells, sides, strict=True)
            inner = (f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>' for cell, side in pairs)
            return f"<tr>{''.join(inner)}</tr>"

        rows = [row_of([_shown(cell) for cell in row], "td") for row in self.rows]
        above, below = [
            "".join(f"<p>{escape(text)}</p>" for text in texts) for texts in (self.lead, self.notes)
        ]
        head, body = row_of(self.head, "th"), "".join(rows)
        return f"{above}<table><thead>{head}</thead><tbody>{body}</tbody></table>{below}"

    def _text(self) -> str:
        cells = [self.head, *(tuple(map(_shown, row)) for row in self.rows)]
        lines = aligned(cells, self._texts())
        above, below = ([*self.lead, ""] if self.lead else []), (["", *self.notes] if self.notes else [])
        return "\n".join([*above, *lines, *below])

    def _markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return f"| {' | '.join(cells)} |"

        rule = line([":---" if is_left else "---:" for is_left in self._texts()])
        rows = [
            line([_shown(cell) if isinstance(cell, Measured) else _in_markdown(_shown(cell)) for cell in row])
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
                [
                    as_written(value)
                    for cell, parts in zip(row, kinds, strict=True)
                    for value in _parts_of(cell, parts)
                ]
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
        columns = ([_value_of(row[number]) for row in self.rows] for number in range(len(self.head)))
        return [all(isinstance(cell, str | None) for cell in column) for column in columns]

    def _parts(self, column: int) -> tuple[str, ...]:
        """Return the parts that a column has in CSV: a measured number is several."""
        cells = [row[column] for row in self.rows]
        is_measured = any(isinstance(_value_of(cell), Measured) for cell in cells)
        if not is_measured and self.head[column] not in self.measured:
            return ("",)
        return ("", "low", "high", *(["sd"] if self.is_drawn and Measured in map(type, cells) else []))


class Tabular(Brief, ABC):
    """Results that are a table: for pandas, printed, and as notebooks show them."""

    def table(self, form: Format = "text") -> str:
        """Return what people read of it, in one of `FORMATS`; here all of `as_table`."""
        return self.as_table().write(form)

    def __str__(self) -> str:
        return self.table()

    @property
    def brief(self) -> str:
        found = self.as_table()
        return f"{len(found.rows):,} rows of {', '.join(filter(None, found.head))}; print it to read them"

    @abstractmethod
    def as_table(self) -> Table:
        """Return everything that is worth a row."""

    def to_frame(self) -> pandas.DataFrame:
        """Return the rows of the table for pandas; an interval is two more columns, `low` and `high`."""
        return self.as_table().to_frame()

    def _repr_html_(self) -> str:
        """Return the table as notebooks show it."""
        return self.as_table()._repr_html_()


def _value_of(cell: Cell) -> str | int | float | Measured | None:
    """Return what programs get of a cell."""
    return cell.value if isinstance(cell, Shown) else cell


def _parts_of(cell: Cell, parts: Sequence[str]) -> Iterator[str | int | float | None]:
    """Yield the parts of a cell: those that it has, None for the others."""
    value = _value_of(cell)
    if isinstance(value, Measured):
        by_part = {"": value.value, "low": value.low, "high": value.high, "sd": value.deviation}
        yield from (by_part[part] for part in parts)
    else:
        yield from (value if part == "" else None for part in parts)


def as_written(value: str | float | None) -> str:
    """Return a value as CSV has it: a number with all digits that tell it from others, nothing if None."""
    return "" if value is None else repr(float(value)) if isinstance(value, float) else str(value)


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, Shown):
        return cell.text
    return f"{cell:.3f}" if isinstance(cell, float) else " ".join(str(cell).split())


def _in_markdown(text: str) -> str:
    return "".join(f"\\{sign}" if sign in _MARKDOWN else sign for sign in text)


def _in_latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))
