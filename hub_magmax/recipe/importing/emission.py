"""Recipes from counterparts: method and preference for most tensors, and rules for the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from hub_magmax.recipe.blocks import block_of, depths_of
from hub_magmax.recipe.importing.cases import Case, escaped
from hub_magmax.recipe.importing.counterparts import ONE, Counterpart, shares_of, short
from hub_magmax.recipe.importing.parameters import Value, constant
from hub_magmax.recipe.importing.regions import Blocks, Region

#: A region with its cases, each with what merges it.
Merged = tuple[Region, Sequence[tuple[Case, Counterpart]]]


class NoSharesError(Exception):
    """The weights outside of the blocks are no shares of the tasks."""


class NamesNeededError(Exception):
    """Tensors have to be told by names that are not known."""


@dataclass(frozen=True)
class Entry:
    """A rule before it is written.

    Attributes:
        globs: One rule each.
        blocks: That it covers; None for all.
        found: How its tensors are merged.
        is_factor: Whether `layers` says where the tensors are copied from, so that a factor is left to say.
    """

    globs: tuple[str, ...]
    blocks: Blocks | None
    found: Counterpart
    is_factor: bool = False


def method_and_rules(merged: Sequence[Merged], *, is_stack: bool) -> dict[str, Any]:
    """Return `method`, `preference` and `tensors` of a recipe; nothing where `layers` copies everything.

    Args:
        merged: Every region: one for all of a model, or what stands before the blocks, the blocks, and what
            stands after them.
        is_stack: Whether the recipe's `layers` say what is copied, with what stands before and after.

    Raises:
        NoSharesError: If the weights outside of the blocks are no shares of the tasks.
        NamesNeededError: If tensors have to be told by names that are not known.
    """
    kept = [one for one in merged if not (is_stack and _is_copied(one[1]))]
    default = _known(*kept[-1][1][-1]) if kept else None
    entries = chain.from_iterable(_entries_of(one, default if one in kept else None) for one in merged)
    if default is None:
        return _with_rules({}, entries, None)
    return _with_rules(_top(default), chain(entries, _at_last(default, *kept[-1])), default)


def _with_rules(
    found: dict[str, Any], entries: Iterable[Entry], default: Counterpart | None
) -> dict[str, Any]:
    rules = [rule for entry in entries for rule in _rules(entry, default)]
    return found | ({"tensors": rules} if rules else {})


def _at_last(
    default: Counterpart, region: Region, cases: Sequence[tuple[Case, Counterpart]]
) -> Iterator[Entry]:
    """Yield the last rule: what the recipe itself cannot say of the tensors that no other rule covers."""
    if not _is_plain(default):
        for entry in _by_block(Entry(("*",), None, default), region, cases[-1][0]):
            if default.numbers_at is None or entry.found != _outside(default):
                yield entry


def _entries_of(one: Merged, default: Counterpart | None) -> Iterator[Entry]:
    """Yield the rules of a region, which is merged as the recipe itself says, or else copied by `layers`."""
    region, cases = one
    known = [(case, _known(case, found)) for case, found in cases]
    yield from _factors(region, known) if default is None else _entries(region, known, default)


def _known(case: Case, found: Counterpart) -> Counterpart:
    """Return the numbers outside of the blocks, where no tensor of a case is in a block."""
    return _outside(found) if _has_no_block(case) else found


def _is_copied(cases: Sequence[tuple[Case, Counterpart]]) -> bool:
    """Say whether all of a region is copied from one source."""
    takes = {found.take for _, found in cases}
    return len(takes) == 1 and None not in takes


def _factors(region: Region, cases: Sequence[tuple[Case, Counterpart]]) -> Iterator[Entry]:
    """Yield the rules of a region that `layers` copies: what it is multiplied by."""
    *others, (last, found) = cases
    if all(one.factor == ONE for _, one in cases):
        return
    for case, one in others if not region.is_outside else cases:
        globs = tuple(map(escaped, case.names)) if region.is_outside else case.globs
        if not globs:
            raise NamesNeededError
        entry = Entry(globs, None if region.is_outside else region.blocks, one, is_factor=True)
        yield from _by_block(entry, region, case)
    if not region.is_outside and found.factor != ONE:
        yield from _by_block(Entry(("*",), region.blocks, found, is_factor=True), region, last)


def _by_block(entry: Entry, region: Region, case: Case) -> Iterator[Entry]:
    """Yield a rule, or one for each block where a factor, or what no gradient says, differs between them."""
    if entry.found.factor.is_constant and entry.found.numbers_at is None:
        yield entry
        return
    if not region.names:
        raise NamesNeededError
    first, end = entry.blocks or (0, max(depths_of(region.names).values()))
    places = [block_of(name) for name in case.names]
    for block in sorted({place.number for place in places if place is not None}):
        yield replace(entry, blocks=(block, block + 1), found=_at(entry.found, block - first, end - first))
    if None in places:
        yield replace(entry, found=_outside(entry.found))


def _at(found: Counterpart, block: int, count: int) -> Counterpart:
    """Return how one of so many blocks is merged; one alone stands at the end of a gradient."""
    share = block / (count - 1) if count > 1 else 1.0
    numbers_at, found = found.numbers_at, _resolved(found, share)
    return replace(found, numbers=numbers_at(share)) if numbers_at else found


def _entries(
    region: Region, cases: Sequence[tuple[Case, Counterpart]], default: Counterpart
) -> Iterator[Entry]:
    """Yield the rules of a region; what the recipe itself says needs none."""
    if region.is_outside:
        yield from _entries_outside(cases, default)
        return
    *others, (last_case, last) = cases
    for case, found in others:
        yield from _by_block(Entry(case.globs, region.blocks, found), region, case)
    if last != default or (region.blocks is not None and not _is_plain(default)):
        yield from _by_block(Entry(("*",), region.blocks, last), region, last_case)


def _entries_outside(cases: Sequence[tuple[Case, Counterpart]], default: Counterpart) -> Iterator[Entry]:
    for case, found in cases:
        if found != default:
            if not case.names:
                raise NamesNeededError
            yield Entry(tuple(map(escaped, case.names)), None, found)


def _has_no_block(case: Case) -> bool:
    """Say whether it is known that no tensor of a case is in a block: a gradient has no meaning there."""
    return bool(case.names) and all(block_of(name) is None for name in case.names)


def _is_plain(found: Counterpart) -> bool:
    """Say whether a recipe itself can say this: there are no copies and no gradients."""
    return (
        found.take is None
        and found.numbers_at is None
        and all(value.is_constant for value in _values_in(found))
    )


def _values_in(found: Counterpart) -> Iterator[Value]:
    yield from found.numbers.values()
    yield found.scaling
    for option in found.options.values():
        of_tasks = option.values() if isinstance(option, Mapping) else (option,)
        yield from (value for value in of_tasks if isinstance(value, Value))


def _top(found: Counterpart) -> dict[str, Any]:
    """Return method and preference as they count outside of the blocks."""
    options = {name: _plain(option) for name, option in found.options.items()}
    if options.get("consensus") == "mean":
        del options["consensus"]
    method = {"name": found.method, **options, "scaling": short(found.scaling.first)}
    if not found.numbers:
        return {"method": method}
    if found.kind == "coefficients":
        numbers = {task: short(value.first) for task, value in found.numbers.items()}
    elif (shares := shares_of(found.numbers)) is not None:
        numbers = {task: short(share) for task, share in shares[0].items()}
    else:
        raise NoSharesError
    return {"method": method, "preference": {found.kind: numbers}}


def _plain(option: Any) -> Any:
    """Return an option as it counts outside of the blocks."""
    if isinstance(option, Mapping):
        return {task: _plain(value) for task, value in option.items()}
    return short(option.first) if isinstance(option, Value) else option


def _rules(entry: Entry, default: Counterpart | None) -> Iterator[dict[str, Any]]:
    for glob in entry.globs:
        place: dict[str, Any] = {} if glob == "*" and entry.blocks is not None else {"match": glob}
        if entry.blocks is not None:
            place["layers"] = [*entry.blocks]
        if entry.found.take is not None:
            yield place | _copied(entry)
        elif default is not None:
            yield place | _differing(entry.found, default, over_layers=entry.blocks is not None)


def _copied(entry: Entry) -> dict[str, Any]:
    """Return what a rule says of tensors that are copied."""
    take = {} if entry.is_factor else {"take": entry.found.take}
    is_scaled = entry.is_factor or entry.found.factor != ONE
    return take | ({"factor": short(entry.found.factor.first)} if is_scaled else {})


def _differing(found: Counterpart, default: Counterpart, *, over_layers: bool) -> dict[str, Any]:
    """Return the values of a rule that are not those of the recipe; the scaling where all of them are."""
    values, usual = _written(found, over_layers=over_layers), _written(_outside(default), over_layers=False)
    options = {key: value for key, value in values["options"].items() if usual["options"].get(key) != value}
    names = ("weights", "coefficients", "scaling")
    kept: dict[str, Any] = {key: values[key] for key in names if key in values}
    kept = {key: value for key, value in kept.items() if usual.get(key) != value}
    kept |= {"options": options} if options else {}
    return kept or {"scaling": values["scaling"]}


def _written(found: Counterpart, *, over_layers: bool) -> dict[str, Any]:
    def number(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {task: number(one) for task, one in value.items()}
        if not isinstance(value, Value):
            return value
        if value.is_constant:
            return short(value.first)
        gradient = {"gradient": [short(point) for point in value.points]}
        return gradient | ({"over": "layers"} if over_layers else {})

    options = {name: number(option) for name, option in found.options.items()}
    numbers = {found.kind: number(found.numbers)} if found.numbers else {}
    return {**numbers, "scaling": number(found.scaling), "options": options}


def _outside(found: Counterpart) -> Counterpart:
    """Return what counts outside of the blocks, as the recipe itself says it."""
    return _resolved(found, 0.0)


def _resolved(found: Counterpart, share: float) -> Counterpart:
    """Return the same with the numbers that gradients have at a share of the way through the blocks."""

    def resolved(option: Any) -> Any:
        if isinstance(option, Mapping):
            return {task: resolved(value) for task, value in option.items()}
        # Values are floats: an option that counts, such as max_iter, is a plain int, and stays one.
        return constant(option.at(share)) if isinstance(option, Value) else option

    return replace(
        found,
        numbers=resolved(found.numbers),
        scaling=resolved(found.scaling),
        factor=resolved(found.factor),
        options={name: resolved(option) for name, option in found.options.items()},
        numbers_at=None,
    )
