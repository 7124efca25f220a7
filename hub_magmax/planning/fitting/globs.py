"""Names of tensors in few words: patterns for people to read, and globs for a recipe."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from glob import escape
from itertools import takewhile

from hub_magmax.text import rule_text

_DIGITS = re.compile(r"\d+")

#: Numbers that are listed one by one.
_MOST_LISTED = 4


def grouped(names: Iterable[str]) -> list[str]:
    """Return patterns of names that differ in numbers alone, such as `layers.{0..31}.mlp.bias`, in order."""
    groups: dict[str, list[list[int]]] = {}
    for name in names:
        groups.setdefault(_DIGITS.sub("#", name), []).append([int(n) for n in _DIGITS.findall(name)])
    return [_with_ranges(pattern, rows) for pattern, rows in groups.items()]


def _with_ranges(pattern: str, rows: Sequence[Sequence[int]]) -> str:
    columns = iter(sorted(set(column)) for column in zip(*rows, strict=True))
    return "".join(_range(next(columns)) if piece == "#" else piece for piece in re.split("(#)", pattern))


def _range(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers[-1] - numbers[0] == len(numbers) - 1 and len(numbers) > 2:
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    first = [str(number) for number in numbers[:_MOST_LISTED]]
    return f"{{{','.join([*first, '…'] if len(numbers) > _MOST_LISTED else first)}}}"


def settling_globs(names: Collection[str], others: Iterable[str]) -> list[str]:
    """Return few globs that match all of `names`, and none of the `others`."""
    return list(_Globs(names, others).covering([], [name.split(".") for name in names]))


def rules_for(names: Collection[str], every_name: Iterable[str], take: str) -> list[str]:
    """Return rules of a recipe that take these tensors from one place, and no other ones."""
    return [rule_text(glob, take) for glob in settling_globs(names, every_name)]


class _Globs:
    """Globs that match none of the other names."""

    def __init__(self, names: Collection[str], others: Iterable[str]) -> None:
        taken = set(names)
        self._others = sorted(name for name in set(others) if name not in taken)

    def covering(self, before: list[str], names: Sequence[list[str]]) -> Iterator[str]:
        """Yield globs for names, given by segments, that go on after these first ones, which are globs."""
        wide = ".".join([*before, "*"])
        if len(names) > 1 and before and self._is_free(wide):
            yield wide
            return
        for start, group in self._split(before, names):
            longer = [name for name in group if len(name) > len(start)]
            yield from self._ends(start, [name for name in group if len(name) == len(start)])
            yield from self.covering(start, longer) if len(longer) > 1 else map(_literal, longer)

    def _ends(self, start: list[str], names: Sequence[list[str]]) -> Iterator[str]:
        glob = ".".join(start)
        yield from [glob] if len(names) > 1 and self._is_free(glob) else map(_literal, names)

    def _split(
        self, before: list[str], names: Sequence[list[str]]
    ) -> Iterator[tuple[list[str], list[list[str]]]]:
        """Yield the names by their next segment; those that differ in numbers stay together if they can."""
        depth = len(before)
        alike: dict[str, list[list[str]]] = {}
        for name in names:
            alike.setdefault(_DIGITS.sub("*", escape(name[depth])), []).append(name)
        for segment, group in alike.items():
            apart: dict[str, list[list[str]]] = {}
            for name in group:
                apart.setdefault(escape(name[depth]), []).append(name)
            if len(apart) > 1 and self._holds_together([*before, segment], group):
                yield [*before, segment], group
            else:
                yield from (([*before, own], part) for own, part in apart.items())

    def _holds_together(self, start: list[str], names: Sequence[list[str]]) -> bool:
        """Say whether the names can be told from others by what follows, whatever their numbers."""
        tails = {tuple(_DIGITS.sub("*", escape(segment)) for segment in name[len(start) :]) for name in names}
        return all(self._is_free(".".join([*start, *tail])) for tail in tails)

    def _is_free(self, glob: str) -> bool:
        literal = "".join(takewhile(lambda sign: sign not in "*?[", glob))
        for name in self._others[bisect_left(self._others, literal) :]:
            if not name.startswith(literal):
                return True
            if fnmatchcase(name, glob):
                return False
        return True


def _literal(name: Sequence[str]) -> str:
    return escape(".".join(name))
