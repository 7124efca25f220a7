"""Numbers as a page has them, and tables of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.page_tables import table


def pivot(
    by_number: Mapping[str, Sequence[Mapping[str, Any]]],
    down: str,
    across: str,
    cell: Callable[[Mapping[str, Any]], str],
) -> str:
    """Return a table: rows by `down`, columns by number of tasks and `across`."""
    columns = list(dict.fromkeys((number, row[across]) for number, rows in by_number.items() for row in rows))
    cells = {
        (number, row[across], row[down]): cell(row) for number, rows in by_number.items() for row in rows
    }
    values = sorted({key[2] for key in cells})
    body = [[f"{value:g}", *(cells.get((*column, value), "") for column in columns)] for value in values]
    return table([down, *(f"T = {number}, {name}" for number, name in columns)], body)


def per_cent(value: float) -> str:
    """Return a share in per cent."""
    return f"{100 * value:.1f}"


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation in per cent; the mean alone of a single seed."""
    return " ± ".join(map(per_cent, values))


def difference(test: Mapping[str, Any]) -> str:
    """Return a difference with its interval, in points; without one for a single seed."""
    if test["interval"] is None:
        return f"{signed(test['difference'])} (one seed)"
    low, high = (f"{100 * bound:.1f}" for bound in test["interval"])
    return f"{signed(test['difference'])} [{low}, {high}]"


def signed(share: float) -> str:
    """Return a difference of shares in points; zero has no sign below it."""
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def probability(value: float | None) -> str:
    """Return a p-value."""
    if value is None:
        return "unknown"
    return f"{value:.2g}" if value >= 1e-4 else "<1e-4"
