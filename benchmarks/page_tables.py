"""Tables of the documentation that a script writes in place of those that are there."""

from __future__ import annotations

import re
from pathlib import Path

from hub_magmax.files import write_text


def replace_tables(page: Path, pattern: str, tables: str) -> None:
    """Write tables into a page in place of what `pattern` matches, which has to be there once."""
    text = page.read_text(encoding="utf-8")
    written, count = re.subn(pattern, lambda _: tables, text)
    assert count == 1, f"{page.name} has {count} places that match {pattern!r}, where one is expected"
    write_text(page, written)
