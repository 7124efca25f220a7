"""Text for people: quoting, hints, sizes, names cut to a width, inert Markdown, nothing secret or unseen."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import takewhile
from typing import Any

#: Called with a line of text at each step of a long task.
Report = Callable[[str], None]

#: Opens what is called with each step's size, of a total: called with the total, with what is done, and with
#: the unit, `bytes` or such as `examples`.
ProgressBar = Callable[[int, str, str], AbstractContextManager[Callable[[int], None] | None]]


def unseen(total: int, doing: str, unit: str) -> AbstractContextManager[None]:
    """Show no progress."""
    return nullcontext()


LOG = logging.getLogger(__name__)

#: Level of records that are no line of their own, and say what goes on.
STATE_LEVEL = 5


@contextmanager
def step(doing: str, report: Report | None = None) -> Iterator[None]:
    """Name the work of this block, for what a terminal shows meanwhile; after it the work around it goes on.

    Args:
        doing: In words, such as "loading the examples".
        report: Called with them first; otherwise they are a detail of the log.
    """
    if report is not None:
        report(doing)
    level, key = STATE_LEVEL if report else logging.DEBUG, object()
    LOG.log(level, "%s", doing, extra={"step_begins": key})
    try:
        yield
    finally:
        LOG.log(STATE_LEVEL, "%s", doing, extra={"step_ends": key})


#: Most characters of the part in which names differ that are kept where both ends of a name are cut.
_PART_LENGTH = 12

_TOKEN = re.compile(r"(?<![A-Za-z0-9])(hf|hf_oauth|api_org)_[A-Za-z0-9]{20,}")
_CREDENTIALS = re.compile(r"(https?://)[^/@\s]+@", re.IGNORECASE)

#: Variables whose value is a token, whatever it looks like.
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

#: A shorter value is a word of its own that means nothing, and may stand anywhere.
_SHORTEST_TOKEN = 8


class Brief:
    """A value that is shown in one line, since all that it holds would fill pages."""

    @property
    def brief(self) -> str:
        """What it is, in a few words."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.brief}>"


def holds_token(text: str) -> bool:
    """Say whether `text` holds what looks like an access token, or an address with a password."""
    return bool(_TOKEN.search(text) or _CREDENTIALS.search(text))


def without_tokens(text: str) -> str:
    """Return `text` without what looks like an access token, and without passwords in addresses."""
    return _TOKEN.sub(r"\1_…", _CREDENTIALS.sub(r"\1", text))


def without_secrets(text: str) -> str:
    """Return `without_tokens(text)`, and without the token in use, whatever it looks like."""
    for name in TOKEN_VARIABLES:
        token = os.environ.get(name, "").strip()
        if len(token) >= _SHORTEST_TOKEN:
            text = text.replace(token, "hf_…")
    return without_tokens(text)


def holds_control(text: str) -> bool:
    """Say whether `text` holds control characters, line breaks too, or bytes that are not text."""
    return any(unicodedata.category(c) in ("Cc", "Cs") for c in text)


def spelled_out(text: str) -> str:
    """Return `text` in one line: as `printable`, with line breaks spelled out too."""
    return printable(text).replace("\n", "\\u000a")


def printable(text: str) -> str:
    """Return `text` with control characters spelled out, and characters that turn the writing direction.

    Line breaks stay.
    """
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else f"\\u{ord(c):04x}"
        for c in text
    )


def shown(value: Any, most: int = 100) -> str:
    """Return a value that others wrote as messages show it: quoted, on one line, cut at `most` characters."""
    if isinstance(value, str):
        return repr(value) if len(value) <= most else f"{value[: most - 3]!r}..."
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown_apart(one: Any, other: Any, most: int = 100) -> tuple[str, str]:
    """Return two different values as `shown`, cut alike around the first place where their texts differ."""
    texts = repr(one), repr(other)
    if max(map(len, texts)) <= most:
        return texts
    pairs = enumerate(zip(*texts, strict=False))
    first = next((place for place, (a, b) in pairs if a != b), min(map(len, texts)))
    start = max(0, first - most // 4)
    return _window(texts[0], start, most), _window(texts[1], start, most)


def _window(text: str, start: int, most: int) -> str:
    cut = text[start : start + most]
    return f"{'...' if start else ''}{cut}{'...' if start + most < len(text) else ''}"


def number_of(count: int, noun: str) -> str:
    """Return "1 file", or "2 files": a number with its noun, whose plural ends with an s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def aligned(rows: Sequence[Sequence[str]], is_left: Sequence[bool]) -> list[str]:
    """Return rows of cells as lines, two spaces between columns.

    Args:
        rows: At least one, all of the same length.
        is_left: Of each column, whether its cells begin below each other; otherwise they end so.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, is_left, strict=True)
        ).rstrip()
        for row in rows
    ]


def listed(items: Sequence[str], most: int = 255) -> str:
    """Return "a, b and c", or "a, b and 7 more" where there are more than `most`; at least one item."""
    rest = len(items) - most
    *first, last = items if rest <= 0 else [*items[:most], f"{rest} more"]
    return f"{', '.join(first)} and {last}" if first else last


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the question whether the nearest of the known names is meant; empty where none is near."""
    found = nearest_of(name, known)
    return f"did you mean {found!r}?" if found else ""


def nearest_of(name: str, known: Sequence[str]) -> str:
    """Return the nearest of the known names; empty where none is near."""
    plain = {_plain(one): one for one in reversed(known)}
    found = difflib.get_close_matches(_plain(name), plain, n=1)
    return plain[found[0]] if found else ""


def _plain(name: str) -> str:
    """Return a name in small letters, with one sign between its words."""
    return re.sub(r"[\s/.-]", "_", name.lower())


def at_most(length: int) -> Callable[[str], bool]:
    """Return what says whether a text has at most so many characters."""
    return lambda text: len(text) <= length


def cut_names(names: Sequence[str], fits: Callable[[str], bool]) -> list[str]:
    """Return names that fit, each cut where it has to be.

    The middle is left out, unless names differ there alone: then the part in which they differ is kept. Where
    that does not tell them apart, they are numbered.

    Args:
        names: All that are shown together.
        fits: Says whether a text is short enough; what is shorter than one that fits does as well.
    """
    found = [cut_name(name, fits) for name in names]
    for alike in _cut_alike(found, names):
        for number in alike:
            found[number] = _around_difference(names[number], [names[n] for n in alike], fits)
    for alike in _cut_alike(found, names):
        for number in alike:
            start = f"{number + 1}: "
            found[number] = start + cut_name(names[number], partial(_fits_after, start, fits))
    return found


def cut_name(name: str, fits: Callable[[str], bool]) -> str:
    """Return a name without as much of its middle as it takes to fit."""
    return _first_that_fits(
        [name, *(_without_middle(name, length) for length in range(len(name) - 2, -1, -1))], fits
    )


def _fits_after(start: str, fits: Callable[[str], bool], text: str) -> bool:
    return fits(start + text)


def _without_middle(name: str, length: int) -> str:
    return f"{name[: length - length // 2]}…{name[len(name) - length // 2 :]}"


def _around_difference(name: str, alike: Sequence[str], fits: Callable[[str], bool]) -> str:
    """Return the part of a name in which it differs from names like it, and as much of its ends as fits."""
    start = _num_in_common(alike)
    stop = len(name) - _num_in_common([other[::-1] for other in alike])
    part = name[start : min(max(stop, start + 1), start + _PART_LENGTH)]
    cuts = [
        f"{name[:length]}…{part}…{name[len(name) - length // 2 :]}"
        for length in range(min(start, 2 * (len(name) - stop)) - 1, -1, -1)
    ]
    return _first_that_fits([*cuts, part], fits)


def _num_in_common(names: Sequence[str]) -> int:
    """Return how many characters all names begin with."""
    columns = zip(*names, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _first_that_fits(cuts: Sequence[str], fits: Callable[[str], bool]) -> str:
    """Return the first of ever shorter texts that fits, or else the last."""
    number = bisect_left(range(len(cuts)), True, key=lambda number: fits(cuts[number]))
    return cuts[min(number, len(cuts) - 1)]


def _cut_alike(found: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """Return the places of different names that were cut to the same text."""
    places: dict[str, list[int]] = {}
    for number, text in enumerate(found):
        places.setdefault(text, []).append(number)
    return [alike for alike in places.values() if len({names[number] for number in alike}) > 1]


#: Units of sizes, each a thousand times the one before.
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


def format_bytes(count: int, unit: str = "") -> str:
    """Return `count` in a unit of sizes, by default the one people read: 1.5 GB is 1.5·10⁹ bytes."""
    unit = unit or unit_of_bytes(count)
    size = count / 1000 ** _BYTE_UNITS.index(unit)
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def unit_of_bytes(count: int) -> str:
    """Return the unit in which people read a size: the largest of which there is one at least."""
    fitting = (unit for power, unit in enumerate(_BYTE_UNITS, 1) if count < 1000**power)
    return next(fitting, _BYTE_UNITS[-1])


def weight_in_words(weight: float, digits: int = 4) -> str:
    """Return a weight or a coefficient with a few digits; estimates that are all but zero as that."""
    return f"{weight:.{digits}g}" if not weight or abs(weight) >= _LEAST_WEIGHT else f"< {_LEAST_WEIGHT}"


def format_seconds(seconds: float) -> str:
    """Return a time as people read it: 12 s, 3 min 20 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


#: Weights of a smaller size are shown as smaller than this.
_LEAST_WEIGHT = 0.0001

#: Longest foreign text shown in a line or a table cell.
MAX_INLINE = 120

#: Control and format characters, surrogates, private use, line and paragraph separators: they
#: show nothing, or make a reader see something else than what is there.
_INVISIBLE = frozenset(("Cc", "Cf", "Cs", "Co", "Zl", "Zp"))

#: Paths of one machine: absolute ones, and relative ones that lead out by two folders or more.
_OF_A_MACHINE = re.compile(r"[/~\\]|(\.\.[/\\]){2}|file:|[A-Za-z]:[\\/]", re.IGNORECASE)


class Markdown(str):
    """Text that is Markdown already and is not made inert again."""

    __slots__ = ()


def code(text: str) -> Markdown:
    """Return one line of foreign text as a code span, safe inside paragraphs, headings and tables."""
    # A pipe would end a table's cell even inside a code span, and renderers disagree on escapes.
    shown = "".join(_spelled_out(c) if c in "`|" else c for c in one_line(text))
    return Markdown(f"`{shown or '⟨empty⟩'}`")


def verbatim(text: str) -> Markdown:
    """Return foreign text as a code span outside of tables: whole, with its white space as it is.

    Invisible characters, line breaks too, are spelled out.
    """
    line = "".join(_spelled_out(c) if is_invisible(c) else c for c in without_tokens(text))
    fence = "`" * (_longest_run(line) + 1)
    # Readers of Markdown take one space off either end, where there is more than spaces between.
    space = " " if "`" in line or (line.strip(" ") and line[0] == line[-1] == " ") else ""
    return Markdown(f"{fence}{space}{line}{space}{fence}" if line else "`⟨empty⟩`")


def quoted(text: str) -> str:
    """Return a text as JSON and YAML read it: between double quotes, invisible characters as escapes."""
    written = json.dumps(text, ensure_ascii=False)
    return "".join(json.dumps(c)[1:-1] if is_invisible(c) else c for c in written)


def rule_text(match: str, take: str = "base_model") -> str:
    """Return a rule of a recipe's `tensors` as it is written there."""
    return f"{{match: {json.dumps(match)}, take: {take}}}"


def fenced(text: str, language: str = "") -> Markdown:
    """Return `text` as a code block whose fence is longer than any run of backticks in it.

    Invisible characters but line breaks are spelled out.
    """
    text = "".join(_spelled_out(c) if is_invisible(c) and c != "\n" else c for c in text)
    fence = "`" * max(3, _longest_run(text) + 1)
    return Markdown(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def _longest_run(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max((len(run) for run in re.findall("`+", text)), default=0)


def one_line(text: str) -> str:
    """Return `publishable(text)` as one line, cut at `MAX_INLINE`, with invisible characters spelled out."""
    line = publishable(" ".join(text.split()))
    line = line if len(line) <= MAX_INLINE else line[: MAX_INLINE - 1] + "…"
    return "".join(_spelled_out(c) if is_invisible(c) else c for c in line)


def publishable(text: str) -> str:
    """Return `text` without access tokens, and a path of this machine as its last part only."""
    text = without_tokens(text)
    if not _OF_A_MACHINE.match(text):
        return text
    last = re.split(r"[\\/:]+", text.rstrip("\\/"))[-1]
    return last if last and not last.startswith(("~", "..")) else "(folder)"


def publishable_values(value: Any) -> Any:
    """Return plain values with `publishable` applied to every string in them."""
    if isinstance(value, str):
        return publishable(value)
    if isinstance(value, dict):
        return {publishable_values(key): publishable_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [publishable_values(item) for item in value]
    return value


def is_invisible(character: str) -> bool:
    """Say whether a character shows nothing by itself, line breaks included."""
    return unicodedata.category(character) in _INVISIBLE


def _spelled_out(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"
