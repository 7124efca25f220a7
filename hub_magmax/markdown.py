"""Text of other people inside Markdown: shown, never obeyed.

Names, references and licences come from recipes and from other people's repositories. They are
shown as code, where Markdown has no syntax but the closing backtick, and what could still act
(control characters, changes of writing direction, table and code delimiters) is spelled out.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

from hub_magmax.text import without_tokens

#: Longest foreign text shown in a line or a table cell.
MAX_INLINE = 120

#: Control and format characters, surrogates, private use, line and paragraph separators: they
#: show nothing, or make a reader see something else than what is there.
_INVISIBLE = frozenset(("Cc", "Cf", "Cs", "Co", "Zl", "Zp"))

_ABSOLUTE = re.compile(r"[/~\\]|file:|[A-Za-z]:[\\/]", re.IGNORECASE)


class Markdown(str):
    """Text that is Markdown already and is not made inert again."""

    __slots__ = ()


def code(text: str) -> Markdown:
    """Return one line of foreign text as a code span, safe inside paragraphs, headings and tables."""
    # A pipe would end a table's cell even inside a code span, and renderers disagree on escapes.
    shown = "".join(_spelled_out(c) if c in "`|" else c for c in one_line(text))
    return Markdown(f"`{shown or '⟨empty⟩'}`")


def fenced(text: str, language: str = "") -> Markdown:
    """Return `text` as a code block whose fence is longer than any run of backticks in it.

    Invisible characters but line breaks are spelled out.
    """
    text = "".join(_spelled_out(c) if is_invisible(c) and c != "\n" else c for c in text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def one_line(text: str) -> str:
    """Return `publishable(text)` as one line, cut at `MAX_INLINE`, with invisible characters spelled out."""
    line = publishable(" ".join(text.split()))
    line = line if len(line) <= MAX_INLINE else line[: MAX_INLINE - 1] + "…"
    return "".join(_spelled_out(c) if is_invisible(c) else c for c in line)


def publishable(text: str) -> str:
    """Return `text` without access tokens, and an absolute path as its last part only."""
    text = without_tokens(text)
    if not _ABSOLUTE.match(text):
        return text
    last = re.split(r"[\\/:]+", text.rstrip("\\/"))[-1]
    return last if last and not last.startswith("~") else "(folder)"


def publishable_values(value: Any) -> Any:
    """Return plain values with `publishable` applied to every string in them."""
    if isinstance(value, str):
        return publishable(value)
    if isinstance(value, dict):
        return {publishable_values(key): publishable_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [publishable_values(item) for item in value]
    return value


def visible_json(value: Any) -> str:
    """Return readable JSON in which every invisible character is escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "".join(json.dumps(c)[1:-1] if is_invisible(c) and c != "\n" else c for c in text)


def is_invisible(character: str) -> bool:
    """Say whether a character shows nothing by itself, line breaks included."""
    return unicodedata.category(character) in _INVISIBLE


def _spelled_out(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"
