"""Sources of a lock: pinned, compared with each other, and their layers stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from hub_magmax.checkpoints.adapters.finding import with_placed_adapters
from hub_magmax.checkpoints.names.renamed import with_base_names
from hub_magmax.checkpoints.names.renaming import with_renamings
from hub_magmax.checkpoints.opening import open_checkpoints, open_pinned
from hub_magmax.checkpoints.rows.labels import with_label_orders
from hub_magmax.checkpoints.source_cache import PARALLEL_SOURCES, SourceCache
from hub_magmax.checkpoints.ties.finding import with_found_ties
from hub_magmax.planning.fitting.stacking import locked_layers
from hub_magmax.planning.statistics import may_lack
from hub_magmax.recipe.lockfile import Lock, LockedSource, own_base_name
from hub_magmax.recipe.schema import Recipe


def pinned_sources(
    recipe: Recipe, make: Callable[[str], LockedSource], kept: Mapping[str, LockedSource]
) -> dict[str, LockedSource]:
    """Return the recipe's sources pinned: as `kept` has them, by their names in the recipe, or now."""
    fresh = [name for name in dict.fromkeys(recipe.written_sources.values()) if name not in kept]
    with ThreadPoolExecutor(PARALLEL_SOURCES) as pool:  # they wait for answers most of the time
        pinned = {**kept, **dict(zip(fresh, pool.map(make, fresh), strict=True))}
    return {name: pinned[written] for name, written in recipe.written_sources.items()}


def own_bases(recipe: Recipe, sources: Mapping[str, LockedSource]) -> dict[str, LockedSource]:
    """Return the base models that tasks have of their own, by task."""
    return {task.name: sources[own_base_name(task.name)] for task in recipe.tasks if task.base is not None}


def compared_sources(
    recipe: Recipe, sources: Mapping[str, LockedSource], cache: SourceCache
) -> dict[str, LockedSource]:
    """Return pinned sources with what comparing them tells: names, ties, places of adapters, labels."""
    with open_pinned(recipe, sources, cache) as opened:
        found = with_renamings(recipe, sources, opened)
        named = with_base_names(opened, found)
        found = with_placed_adapters(recipe, with_found_ties(found, named, may_lack), named)
        return with_label_orders(recipe, found, opened)


def with_locked_layers(recipe: Recipe, found: Lock, cache: SourceCache) -> Lock:
    """Return a lock with the recipe's stack of layers, where it has one, once that fits the checkpoints."""
    if not recipe.layers:
        return found
    with open_checkpoints(recipe, found, cache) as opened:
        return replace(found, layers=locked_layers(recipe, found.every_source, opened))
