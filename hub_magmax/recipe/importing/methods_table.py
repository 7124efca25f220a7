"""Table of mergekit's methods and what makes the counterpart of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hub_magmax.recipe.importing import geometry, means, trimming
from hub_magmax.recipe.importing.counterparts import Counterpart, Maker, one_by_one
from hub_magmax.recipe.importing.readings import LostError, Readings
from hub_magmax.registry import METHODS

_MAKERS: Mapping[str, Maker] = {
    "linear": means.linear,
    "task_arithmetic": means.task_arithmetic,
    "passthrough": one_by_one(means.copied),
    "ties": one_by_one(trimming.elected),
    "dare_linear": one_by_one(trimming.summed),
    "dare_ties": one_by_one(trimming.elected),
    "breadcrumbs": one_by_one(trimming.summed),
    "breadcrumbs_ties": one_by_one(trimming.elected),
    "della": one_by_one(trimming.elected),
    "della_linear": one_by_one(trimming.summed),
    "slerp": geometry.slerp,
    "nuslerp": one_by_one(geometry.nuslerp),
    "multislerp": one_by_one(geometry.multislerp),
    "karcher": one_by_one(geometry.karcher),
    "model_stock": one_by_one(geometry.model_stock),
    "arcee_fusion": one_by_one(geometry.arcee_fusion),
    "nearswap": one_by_one(geometry.nearswap),
    "sce": one_by_one(geometry.sce),
    "ram": one_by_one(geometry.ram),
    "ramplus_tl": one_by_one(geometry.ram),
}


def counterparts_of(every: Sequence[Readings]) -> list[Counterpart] | None:
    """Return how each case is merged, all by one method; None, noted, where nothing computes the same."""
    first = every[0]
    maker = _MAKERS.get(first.method)
    try:
        found = _unchanged(every) or (maker(every) if maker else [])
        if not found or found[0].method not in METHODS.built_in:
            raise first.lost(f"there is no method here that computes what {first.method} does")
    except LostError:
        return None
    for one in found:
        first.notes.add(first.configuration.method_at, one.verdict, one.why)
    return found


def _unchanged(every: Sequence[Readings]) -> list[Counterpart]:
    """Return copies of the base model, where nothing is added to it; nothing where a model takes part."""
    first = every[0]
    if first.family.tasks or not first.configuration.method.adds:
        return []
    one_by_one(lambda read: read.each("weight"))(every)
    why = "no other model than the base model, which is copied"
    return [Counterpart("single_task", take="base_model", verdict="exact", why=why) for _ in every]
