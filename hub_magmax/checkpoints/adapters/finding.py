"""Adapters of a lock, compared with their base model once, when the lock is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from hub_magmax.checkpoints.adapters.config import config_of, parse_config
from hub_magmax.checkpoints.adapters.layout import sorted_names
from hub_magmax.checkpoints.adapters.places import find_places, known_places, places_by_prefix
from hub_magmax.checkpoints.adapters.ties import (
    completed_ties,
    may_untie,
    ties_of_class,
    untie,
    with_tied_names,
)
from hub_magmax.checkpoints.config import stated_config
from hub_magmax.checkpoints.index import CheckpointIndex
from hub_magmax.checkpoints.rows.added_rows import find_added_rows
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.recipe.lockfile import LockedSource
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.tensor_rules import rule_for


def with_placed_adapters(
    recipe: Recipe, sources: Mapping[str, LockedSource], opened: Mapping[str, TensorSource]
) -> dict[str, LockedSource]:
    """Return the sources of a lock with what headers and configurations tell about its adapters.

    Each adapter gets the places of its layers in the base model's files, where names do not tell. Where one
    trains a part of what is tied in the base model, it and the whole checkpoints get their ties.

    Args:
        recipe: Says whether adapters are added to each other.
        sources: `base_model` and the tasks, pinned, with the ties of whole checkpoints.
        opened: The same, open, under the base model's names.

    Raises:
        CheckpointError: If an adapter is malformed.
    """
    base = opened["base_model"]
    adapters = {name: opened[name] for name, locked in sources.items() if locked.adapter_config}
    if not adapters:
        return dict(sources)
    ties = _ties_of(base, sources["base_model"], adapters.values())
    index = with_tied_names(base.index, ties)
    places = {name: _places(index, base, adapter.index) for name, adapter in adapters.items()}
    apart = dict(_apart(recipe, adapters, places, index, ties))
    added = _added_rows(recipe, base, index, adapters, places)
    found = {
        name: replace(sources[name], places=where, ties=apart[name], added_rows=added.get(name))
        for name, where in places.items()
    }
    if any(untied is not None for untied in apart.values()):
        found |= _completed(sources, opened, ties)
    return {**sources, **found}


def _completed(
    sources: Mapping[str, LockedSource], opened: Mapping[str, TensorSource], ties: Mapping[str, str]
) -> dict[str, LockedSource]:
    """Return the whole checkpoints with all names that the base model ties."""
    return {
        name: replace(locked, ties=completed_ties(opened[name], locked.ties or {}, ties) or None)
        for name, locked in sources.items()
        if not locked.adapter_config
    }


def _ties_of(base: TensorSource, locked: LockedSource, adapters: Iterable[TensorSource]) -> Mapping[str, str]:
    """Return what is tied in the base model; its class is asked where an adapter may untie something."""
    ties = locked.ties or {}
    if any(may_untie(adapter.index, base.index) for adapter in adapters):
        return {**ties_of_class(base), **ties}
    return ties


def _places(index: CheckpointIndex, base: TensorSource, adapter: CheckpointIndex) -> Mapping[str, str] | None:
    """Return where an adapter's tensors are in the base model's files; None where names tell."""
    modules, whole = _names(adapter)
    place = places_by_prefix(index, modules)
    if place is not None and all(where.name in index.tensors for name in whole for where in place(name)):
        return None
    names = [f"{module}.weight" for module in modules] + whole
    return find_places(index, base.index, stated_config(base), names) or None


def _apart(
    recipe: Recipe,
    adapters: Mapping[str, TensorSource],
    places: Mapping[str, Mapping[str, str] | None],
    index: CheckpointIndex,
    ties: Mapping[str, str],
) -> Iterator[tuple[str, Mapping[str, str] | None]]:
    """Yield the ties of each adapter's checkpoint, None where they are the base model's."""
    before: set[str] = set()
    for name, found in places.items():
        adapter = adapters[name]
        trained = {*_trained(index, adapter.index, found)}
        if parse_config(config_of(adapter), adapter.label).ensures_ties:
            trained = set()
        if recipe.adapters == "sequence":
            before = trained = before | trained
        yield name, untie(ties, trained)


def _trained(
    index: CheckpointIndex, adapter: CheckpointIndex, places: Mapping[str, str] | None
) -> Iterable[str]:
    """Yield the tensors of the base model that an adapter changes."""
    modules, whole = _names(adapter)
    place = known_places(index, modules, places)
    for name in (*(f"{module}.weight" for module in modules), *whole):
        yield from (where.name for where in (place(name) if place else ()))


def _whole(
    index: CheckpointIndex, adapter: CheckpointIndex, places: Mapping[str, str] | None
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors that an adapter holds whole, by the base model's names."""
    factors, whole = sorted_names(adapter)
    place = known_places(index, [module for module, _ in factors], places)
    return {
        where.name: adapter.tensors[path].shape
        for name, path in whole.items()
        for where in (place(name) if place else ())
    }


def _added_rows(
    recipe: Recipe,
    base: TensorSource,
    index: CheckpointIndex,
    adapters: Mapping[str, TensorSource],
    places: Mapping[str, Mapping[str, str] | None],
) -> dict[str, dict[str, int]]:
    """Return what `find_added_rows` finds, unless the recipe says what to do with rows."""
    if recipe.matches_tokens:
        return {}
    whole = {}
    for name, adapter in adapters.items():
        shapes = _whole(index, adapter.index, places[name])
        whole[name] = {
            tensor: shape
            for tensor, shape in shapes.items()
            if shape and rule_for(tensor, recipe.tensors) is None
        }
    return find_added_rows(base, index, adapters, whole)


def _names(adapter: CheckpointIndex) -> tuple[list[str], list[str]]:
    """Return the names of layers with factors, and of whole tensors."""
    factors, whole = sorted_names(adapter)
    return [module for module, _ in factors], [*whole]
