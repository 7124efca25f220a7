"""Adapters of a lock, compared with their base model once, when the lock is made."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace

from hub_magmax.checkpoints.adapter_layout import sorted_names
from hub_magmax.checkpoints.adapter_places import find_places, places_by_prefix
from hub_magmax.checkpoints.opening import open_source
from hub_magmax.checkpoints.pinning import CONFIG_NAME, read_small_file
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.recipe.lockfile import LockedSource
from hub_magmax.recipe.schema import Recipe


def lock_adapters(
    recipe: Recipe, sources: Mapping[str, LockedSource], cache: SourceCache
) -> dict[str, LockedSource]:
    """Return the sources of a lock with the places of adapters' layers in the base model's files.

    Args:
        recipe: Says where relative paths start.
        sources: `base_model` and the tasks, pinned.
        cache: Checkpoints that are open already.

    Raises:
        CheckpointError: If an adapter is malformed.
    """
    found = dict(sources)
    if not any(locked.adapter_config for locked in sources.values()):
        return found
    with closing(open_source(recipe, sources["base_model"], cache)) as base:
        for name, locked in sources.items():
            if locked.adapter_config:
                with closing(open_source(recipe, locked, cache)) as adapter:
                    found[name] = replace(locked, places=_places(base, adapter))
    return found


def _places(base: TensorSource, adapter: TensorSource) -> Mapping[str, str] | None:
    """Return where an adapter's tensors are in the base model's files; None where names tell."""
    factors, whole = sorted_names(adapter.index)
    modules = [module for module, _ in factors]
    known, place = base.index.tensors, places_by_prefix(base.index, modules)
    if place is not None and all(where.name in known for name in whole for where in place(name)):
        return None
    if CONFIG_NAME not in base.sizes:
        return None
    names = [f"{module}.weight" for module in modules] + list(whole)
    return find_places(base.index, read_small_file(base, CONFIG_NAME), names) or None
