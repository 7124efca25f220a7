"""Recipes from counterparts: method and preference for most tensors, and rules for the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hub_magmax.recipe.blocks import block_of
from hub_magmax.recipe.importing.cases import Case, escaped
from hub_magmax.recipe.importing.counterparts import Counterpart, shares_of, short
from hub_magmax.recipe.importing.parameters import Value
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
    """

    globs: tuple[str, ...]
    blocks: Blocks | None
    found: Counterpart


def method_and_rules(merged: Sequence[Merged]) -> dict[str, Any]:
    """Return `method`, `preference` and `tensors` of a recipe.

    Args:
        merged: Every region: one for all of a model, or what stands before the blocks, the blocks, and what
            stands after them.

    Raises:
        NoSharesError: If the weights outside of the blocks are no shares of the tasks.
        NamesNeededError: If tensors have to be told by names that are not known.
    """
    default = merged[-1][1][-1][1]
    entries = [entry for region, cases in merged for entry in _entries(region, cases, default)]
    if not _is_plain(default):
        entries.append(Entry(("*",), None, default))
    found = _top(default)
    rules = [rule for entry in entries for rule in _rules(entry, default)]
    return found | ({"tensors": rules} if rules else {})


def _entries(
    region: Region, cases: Sequence[tuple[Case, Counterpart]], default: Counterpart
) -> Iterator[Entry]:
    """Yield the rules of a region; what the recipe itself says needs none."""
    if region.is_outside:
        yield from _entries_outside(cases, default)
        return
    *others, (_, last) = cases
    for case, found in others:
        yield Entry(case.globs, region.blocks, _outside(found) if _has_no_block(case) else found)
    if last != default or (region.blocks is not None and not _is_plain(default)):
        yield Entry(("*",), region.blocks, last)


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
    return found.take is None and all(value.is_constant for value in _values_in(found))


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


def _rules(entry: Entry, default: Counterpart) -> Iterator[dict[str, Any]]:
    for glob in entry.globs:
        place: dict[str, Any] = {} if glob == "*" and entry.blocks is not None else {"match": glob}
        if entry.blocks is not None:
            place["layers"] = [*entry.blocks]
        if entry.found.take is not None:
            yield place | {"take": entry.found.take}
        else:
            yield place | _differing(entry.found, default, over_layers=entry.blocks is not None)


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

    def first(option: Any) -> Any:
        if isinstance(option, Mapping):
            return {task: first(value) for task, value in option.items()}
        return option.outside if isinstance(option, Value) else option

    return replace(
        found,
        numbers=first(found.numbers),
        scaling=found.scaling.outside,
        options={name: first(option) for name, option in found.options.items()},
    )
