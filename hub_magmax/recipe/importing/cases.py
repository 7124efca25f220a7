"""Cases of a region: groups of tensors for which every parameter is one value or one gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import permutations, product

from hub_magmax.recipe.importing.configuration import Slice
from hub_magmax.recipe.importing.mergekit_methods import REQUIRED, MergekitMethod
from hub_magmax.recipe.importing.parameters import Condition, Value, choices
from hub_magmax.recipe.importing.regions import Region

#: Index of a model in its slice, None for parameters of all; and the parameter's name.
Slot = tuple[int | None, str]

#: Which of the values of each parameter, in the order in which they are tried.
Picks = tuple[int, ...]

#: Cases that are told apart, and texts that the names of one hold, at most.
_MAX_CASES, _MAX_FILTERS = 64, 3


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
        picked: Every parameter of the method.
        globs: One of them matches each of their names; cases before this one come first.
        names: Of the tensors, where they are known.
    """

    picked: Mapping[Slot, Picked]
    globs: tuple[str, ...] = ("*",)
    names: tuple[str, ...] = ()


def cases_of(region: Region, method: MergekitMethod) -> tuple[Case, ...] | None:
    """Return the cases of a region, in the order in which they are tried; the last one takes what is left.

    Cases that no tensor belongs to are left out, where names are known.

    Returns:
        None where there are too many to be told apart, or where that takes names which are not known.
    """
    tried = {slot: _tried(region.part, slot, default) for slot, default in _slots(region.part, method)}
    picked = _by_picks(tried, region)
    if len(picked) > _MAX_CASES:
        return None
    found = [_case(tried, picks) for picks in picked]
    names = [*picked.values()]
    globs = _globs(found, names, are_known=bool(region.names))
    if not all(globs):
        return None
    every = zip(found, globs, names, strict=True)
    return tuple(Case(one.picked, some, own) for one, some, own in every)


def _by_picks(tried: Mapping[Slot, tuple[Picked, ...]], region: Region) -> dict[Picks, tuple[str, ...]]:
    """Return the names of tensors, where they are known, by what counts for them, in order."""
    if not region.names:
        return dict.fromkeys(sorted(_all(tried)), ())
    found: dict[Picks, list[str]] = {}
    for name, own in region.names.items():
        found.setdefault(_of_name(tried, name, own), []).append(name)
    return {picks: tuple(found[picks]) for picks in sorted(found)}


def _globs(
    cases: Sequence[Case], names: Sequence[tuple[str, ...]], *, are_known: bool
) -> list[tuple[str, ...]]:
    """Return the globs of each case; none of one that cannot be told."""
    found = [*(globs_of(_filters(case)) for case in cases[:-1]), ("*",)]
    if not are_known:
        return [some if len(some) == 1 else () for some in found]
    if not _tell_apart(found, names):
        return [*(tuple(map(escaped, own)) for own in names[:-1]), ("*",)]
    return [_that_match(some, own) for some, own in zip(found, names, strict=True)]


def _that_match(globs: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Return the globs that match a name: a rule that covers nothing is refused."""
    return tuple(glob for glob in globs if any(fnmatchcase(name, glob) for name in names))


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


def _of_name(tried: Mapping[Slot, tuple[Picked, ...]], name: str, own: Sequence[str]) -> Picks:
    """Return what counts for a tensor: models look at its name in themselves."""
    return tuple(
        next(
            place
            for place, one in enumerate(options)
            if one.condition is None or one.condition.covers(name if number is None else own[number])
        )
        for (number, _), options in tried.items()
    )


def _all(tried: Mapping[Slot, tuple[Picked, ...]]) -> set[Picks]:
    """Return all combinations, up to one too many."""
    found: set[Picks] = set()
    for picks in product(*(range(len(options)) for options in tried.values())):
        found.add(picks)
        if len(found) > _MAX_CASES:
            break
    return found


def _case(tried: Mapping[Slot, tuple[Picked, ...]], picks: Picks) -> Case:
    return Case({slot: options[n] for (slot, options), n in zip(tried.items(), picks, strict=True)})


def _filters(case: Case) -> tuple[str, ...]:
    """Return the texts that all names of a case hold, without those that another one implies."""
    conditions = (one.condition for one in case.picked.values())
    found = sorted({str(one.filter) for one in conditions if one is not None and not one.is_for_all})
    return tuple(one for one in found if not any(one in other for other in found if other != one))


def _tell_apart(globs: Sequence[Iterable[str]], names: Sequence[Sequence[str]]) -> bool:
    """Say whether the first case with a glob that matches is the right one, for all names."""

    def first(name: str) -> int:
        return next(n for n, some in enumerate(globs) if any(fnmatchcase(name, glob) for glob in some))

    return all(first(name) == own for own, of_case in enumerate(names) for name in of_case)


def globs_of(filters: Sequence[str]) -> tuple[str, ...]:
    """Return globs, one of which matches a name if and only if it holds all of these texts.

    Texts that overlap in a name are seen for two of them; three are taken to stand apart. For more there are
    none.
    """
    if not filters:
        return ("*",)
    if len(filters) > _MAX_FILTERS:
        return ()
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
