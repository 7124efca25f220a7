"""Cases of a configuration: groups of tensors for which every parameter is one value or one gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product

from hub_magmax.recipe.importing.configuration import Slice
from hub_magmax.recipe.importing.mergekit_methods import REQUIRED, MergekitMethod
from hub_magmax.recipe.importing.parameters import Condition, Value, choices

#: Index of a model in its slice, None for parameters of all; and the parameter's name.
Slot = tuple[int | None, str]

#: Cases that are formed without the names of tensors, at most.
_MAX_CASES = 64


@dataclass(frozen=True)
class Picked:
    """The value of a parameter in a case.

    Attributes:
        value: None where the parameter is not written and has no default.
        condition: Where it stands; None for a default.
    """

    value: Value | None
    condition: Condition | None = None


@dataclass(frozen=True)
class Case:
    """Tensors whose parameters are the same, up to gradients.

    Attributes:
        filters: Texts that all of their names hold; cases before this one come first.
        picked: Every parameter of the method.
    """

    filters: tuple[str, ...]
    picked: Mapping[Slot, Picked]

    @property
    def globs(self) -> tuple[str, ...]:
        """Globs over names, one of which matches; one for all names where there are no filters."""
        return globs_of(self.filters)


def cases_of(part: Slice, method: MergekitMethod, names: Sequence[str] = ()) -> tuple[Case, ...] | None:
    """Return the cases of a slice, in the order in which they are tried; the last one takes what is left.

    Args:
        part: The slice.
        method: Says which parameters there are.
        names: Of the tensors; cases that none belongs to are left out. None known: all cases.

    Returns:
        None where there are too many to be told apart.
    """
    tried = {slot: _tried(part, slot, default) for slot, default in _slots(part, method)}
    if names:
        found = {_of_name(tried, name) for name in names}
    else:
        found = _all(tried)
        if len(found) > _MAX_CASES:
            return None
    last = tuple(len(options) - 1 for options in tried.values())
    order = sorted(found | {last})
    return tuple(_case(tried, picks) for picks in order)


def _slots(part: Slice, method: MergekitMethod) -> Iterator[tuple[Slot, object]]:
    for name, default in method.shared.items():
        yield (None, name), default
    for number, one in enumerate(part.inputs):
        if not (one.is_base and method.base != "like the others"):
            for name, default in method.each.items():
                yield (number, name), default


def _tried(part: Slice, slot: Slot, default: object) -> tuple[Picked, ...]:
    """Return the values of a parameter in the order in which they are tried."""
    number, name = slot
    levels = part.levels if number is None else part.inputs[number].levels
    found = choices(levels, name)
    tried = tuple(Picked(condition.value, condition) for condition in found)
    if found and found[-1].is_for_all:
        return tried
    value = None if default in (REQUIRED, None) else Value((default,))
    return (*tried, Picked(value))


def _of_name(tried: Mapping[Slot, tuple[Picked, ...]], name: str) -> tuple[int, ...]:
    return tuple(
        next(n for n, one in enumerate(options) if one.condition is None or one.condition.covers(name))
        for options in tried.values()
    )


def _all(tried: Mapping[Slot, tuple[Picked, ...]]) -> set[tuple[int, ...]]:
    """Return all combinations, up to one too many."""
    found: set[tuple[int, ...]] = set()
    for picks in product(*(range(len(options)) for options in tried.values())):
        found.add(picks)
        if len(found) > _MAX_CASES:
            break
    return found


def _case(tried: Mapping[Slot, tuple[Picked, ...]], picks: Sequence[int]) -> Case:
    picked = {slot: options[n] for (slot, options), n in zip(tried.items(), picks, strict=True)}
    filters = (
        str(one.condition.filter)
        for one in picked.values()
        if one.condition is not None and not one.condition.is_for_all
    )
    return Case(_needed(filters), picked)


def _needed(filters: Iterator[str]) -> tuple[str, ...]:
    """Return filters without those that another one implies."""
    found = sorted(set(filters))
    return tuple(one for one in found if not any(one in other for other in found if other != one))


def globs_of(filters: Sequence[str]) -> tuple[str, ...]:
    """Return globs, one of which matches a name if and only if it holds all of these texts.

    Texts that overlap in a name are seen for two of them; more than two are taken to stand apart.
    """
    if not filters:
        return ("*",)
    found = [f"*{'*'.join(map(escaped, order))}*" for order in permutations(filters)]
    if len(filters) == 2:
        for one, other in permutations(filters):
            found += [
                f"*{escaped(one + other[n:])}*" for n in range(1, len(other)) if one.endswith(other[:n])
            ]
    return tuple(dict.fromkeys(found))


def escaped(text: str) -> str:
    """Return a glob that matches a text alone."""
    return "".join(f"[{sign}]" if sign in "[*?" else sign for sign in text)
