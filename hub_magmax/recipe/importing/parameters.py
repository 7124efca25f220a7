"""Parameters of mergekit: constants, gradients over the blocks, conditions on names, levels."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hub_magmax.recipe.importing.marked import Marked
from hub_magmax.text import shown

#: Numbers that differ by less are the same.
_SAME = 1e-12

#: Words that mergekit takes for true and false, in any case.
_TRUE, _FALSE = ("true", "t", "yes", "y", "on", "1"), ("false", "f", "no", "n", "off", "0")

#: A filter that every name passes.
EVERYTHING = "*"


@dataclass(frozen=True)
class Value:
    """A constant, or a gradient: points at equal distances over the blocks, with straight lines between."""

    points: tuple[Any, ...]

    @property
    def is_constant(self) -> bool:
        return len(set(map(repr, self.points))) == 1

    @property
    def first(self) -> Any:
        """The value of embedding, final norm and head."""
        return self.points[0]

    def in_numbers(self) -> Value | None:
        """Return the same with every point a number; None where one is none."""
        found = [as_number(point) for point in self.points]
        return None if None in found else Value(tuple(found)).simplest

    @property
    def simplest(self) -> Value:
        """The same, with one point where all are equal."""
        return Value(self.points[:1]) if self.is_constant else self

    @property
    def outside(self) -> Value:
        """The value outside of the blocks."""
        return Value(self.points[:1])

    def times(self, factor: float) -> Value:
        """Return all points, which are numbers, multiplied by a factor."""
        return Value(tuple(point * factor for point in self.points))

    def at(self, share: float) -> float:
        """Return the number at a share of the way from the first block to the last one."""
        place = share * (len(self.points) - 1)
        lower = min(int(place), max(len(self.points) - 2, 0))
        rest = place - lower
        upper = self.points[lower + bool(rest)]
        return float((1 - rest) * self.points[lower] + rest * upper) if rest else float(self.points[lower])


def constant(number: float) -> Value:
    """Return the value that is one number everywhere."""
    return Value((float(number),))


def is_whole(density: Value) -> bool:
    """Say whether a share of the elements is all of them, in every block."""
    numbers = density.in_numbers()
    return numbers is not None and min(numbers.points) >= 1


def is_exact_factor(factor: float) -> bool:
    """Say whether products with a factor are not rounded: zero and powers of two."""
    return factor == 0 or abs(math.frexp(factor)[0]) == 0.5


def sums_of(values: Sequence[Value]) -> list[float]:
    """Return what values sum to at every share of the way through the blocks at which one of them turns."""
    lasts = {len(one.points) - 1 for one in values} - {0}
    shares = {0.0, *(n / last for last in lasts for n in range(last + 1))}
    return [math.fsum(one.at(share) for one in values) for share in sorted(shares)]


def constant_sum(values: Sequence[Value]) -> float | None:
    """Return what values sum to in every block; None where that differs."""
    sums = sums_of(values)
    return sums[0] if max(sums) - min(sums) <= _SAME * max(1.0, *map(abs, sums)) else None


@dataclass(frozen=True)
class Condition:
    """A value, and the names that it counts for.

    Attributes:
        filter: Part of a name; None for every name.
        value: What counts.
        at: Where the value stands.
        filter_at: Where the filter stands.
    """

    filter: str | None
    value: Value
    at: Marked
    filter_at: Marked | None = None

    @property
    def is_for_all(self) -> bool:
        return self.filter is None or self.filter == EVERYTHING

    def covers(self, name: str) -> bool:
        return self.is_for_all or str(self.filter) in name


@dataclass(frozen=True)
class Setting:
    """A parameter at one level: the first condition that covers a name counts."""

    at: Marked
    conditions: tuple[Condition, ...]


#: Parameters of one level by name.
Level = Mapping[str, Setting]

#: Signs of names of tensors; a filter with others covers none.
_NAME_SIGNS = re.compile(r"[\w.\-/]*")


def can_match(text: str) -> bool:
    """Say whether the name of a tensor can hold a text."""
    return bool(_NAME_SIGNS.fullmatch(text))


def as_number(value: Any) -> float | None:
    """Return a number that is finite; text such as 1e-5, which YAML 1.1 does not take for one, counts.

    True is 1, as for mergekit.
    """
    try:
        found = math.nan if value is None else float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def as_switch(value: Any) -> bool | None:
    """Return true or false, also of 0, 1 and words that mean it; None for anything else."""
    if isinstance(value, str):
        word = value.lower()
        return True if word in _TRUE else False if word in _FALSE else None
    return bool(value) if value in (0, 1) else None


def read_setting(at: Marked) -> Setting | str:
    """Return a parameter, or why it is none."""
    items = (at,) if at.is_mapping else at.items
    if items is None:
        return Setting(at, (Condition(None, Value((at.value,)), at),))
    if any(item.is_mapping or item.is_list for item in items):
        return _conditional(at, [_condition(item) for item in items])
    points = tuple(item.value for item in items)
    return Setting(at, (Condition(None, Value(points), at),) if points else ())


def _conditional(at: Marked, found: Sequence[Condition | str]) -> Setting | str:
    wrong = [one for one in found if isinstance(one, str)]
    return wrong[0] if wrong else Setting(at, tuple(one for one in found if not isinstance(one, str)))


def _condition(entry: Marked) -> Condition | str:
    """Return `{filter: ..., value: ...}`, or why it is none."""
    written, name = entry.get("value"), entry.get("filter")
    if written is None:
        return f"{shown(entry.plain(), 40)} is no value: a condition is {{filter: ..., value: ...}}"
    inner = read_setting(written) if not written.is_mapping else "a condition in a condition"
    if isinstance(inner, str) or len(inner.conditions) != 1:
        return "a condition has one number, or a list of numbers"
    if name is not None and not isinstance(name.value, str):
        return "a filter is one text, a part of the names of tensors"
    return Condition(str(name.value) if name else None, inner.conditions[0].value, written, name)


def choices(levels: Sequence[Level], name: str) -> tuple[Condition, ...]:
    """Return the conditions of a parameter in the order in which they are tried, level by level."""
    found: list[Condition] = []
    for level in levels:
        for condition in level[name].conditions if name in level else ():
            found.append(condition)
            if condition.is_for_all:
                return tuple(found)
    return tuple(found)


def settings_of(levels: Sequence[Level], name: str) -> Iterator[Setting]:
    """Yield a parameter at every level that has it."""
    return (level[name] for level in levels if name in level)
