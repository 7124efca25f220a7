"""Tables of the documentation in Markdown, written in place of those that are there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hub_magmax.files import write_text


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> str:
    """Return a table whose first `left` columns are of words."""
    rule = "|" + "---|" * left + "---:|" * (len(heads) - left)
    head, *body = (f"| {' | '.join(map(str, row))} |" for row in (heads, *rows))
    return "\n".join([head, rule, *body]) + "\n"


def replace_tables(page: Path, pattern: str, tables: str) -> None:
    """Write tables into a page in place of what `pattern` matches, which has to be there once."""
    text = page.read_text(encoding="utf-8")
    written, count = re.subn(pattern, lambda _: tables, text)
    assert count == 1, f"{page.name} has {count} places that match {pattern!r}, where one is expected"
    write_text(page, written)
