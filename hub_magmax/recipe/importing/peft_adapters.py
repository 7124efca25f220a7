"""Arguments of PEFT's `add_weighted_adapter` in a file, as a recipe that writes one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hub_magmax.recipe.importing.findings import Notes
from hub_magmax.recipe.importing.marked import Marked
from hub_magmax.recipe.importing.model_facts import Models
from hub_magmax.recipe.importing.parameters import as_number
from hub_magmax.recipe.importing.references import Place, read_reference, task_names
from hub_magmax.text import nearest, shown

#: What PEFT does with the products where it is told nothing.
_DEFAULT = "svd"

#: Ways to combine, and why a recipe does not say them; those of `_EXACT` it does say.
_WAYS: Mapping[str, str] = {
    "cat": "",
    "svd": "",  # cut to a rank, as `output.rank` cuts it
    "linear": "PEFT adds factors, not products: of several adapters that is not the weighted sum of them",
    "ties": "PEFT elects and averages within the factors, not within the products",
    "dare_linear": "PEFT draws within the factors, not within the products",
    "dare_ties": "PEFT draws and elects within the factors, not within the products",
    "magnitude_prune": "PEFT prunes the factors, not the products",
    "ties_svd": "the merged product is cut to a rank",
    "dare_linear_svd": "the merged product is cut to a rank",
    "dare_ties_svd": "the merged product is cut to a rank",
    "magnitude_prune_svd": "the merged product is cut to a rank",
}

_KNOWN = (
    "base_model", "adapters", "weights", "combination_type", "adapter_name", "svd_rank", "svd_clamp",
    "svd_full_matrices", "svd_driver", "density", "majority_sign_method",
)  # fmt: skip

#: Keys that change nothing where whole products are summed.
_IDLE = ("adapter_name", "svd_full_matrices", "svd_driver", "density", "majority_sign_method")


def is_peft(values: Marked) -> bool:
    """Say whether a document holds arguments of `add_weighted_adapter`."""
    keys = {*(values.entries or {})}
    return "adapters" in keys and bool(keys & {"weights", "combination_type"}) and "tasks" not in keys


def read_peft(top: Marked, models: Models, notes: Notes) -> dict[str, Any] | None:
    """Return the recipe, as far as there is one, and note a verdict on every line."""
    for key, at in (top.entries or {}).items():
        if key not in _KNOWN:
            hint = nearest(key, _KNOWN)
            notes.add(at, "warning", f"no argument of add_weighted_adapter{f'; {hint}' if hint else ''}")
        elif key in _IDLE:
            notes.add(at, "exact", "changes nothing here")
    places = _adapters(top, notes)
    weights = _weights(top, len(places), notes)
    bound = _bound_rank(top, places, models, notes)
    base = _base(top, places, models, notes)
    if base is None or not weights or not notes.is_whole:
        return None
    names = task_names(places)
    return {
        "schema": 1,
        "base_model": base,
        "tasks": [
            {"name": name, "model": models.written(place)} for name, place in zip(names, places, strict=True)
        ],
        "method": {"name": "task_arithmetic", "scaling": 1.0},
        "preference": {"coefficients": dict(zip(names, weights, strict=True))},
        "output": {"path": "merged", "format": "adapter"} | bound,
    }


def _adapters(top: Marked, notes: Notes) -> list[Place]:
    """Return the adapters: a list, or their names with their places."""
    at = top.get("adapters")
    items = [*((at.entries or {}).values() if at.is_mapping else at.items or ())] if at else []
    if not items:
        notes.lose(at or top, "expected a list of adapters: folders, or repositories")
    found = []
    for item in items:
        reference = read_reference(item)
        if isinstance(reference, str) or reference.lora is not None:
            notes.lose(item, "no name of an adapter: a folder, or a repository with @revision")
        else:
            notes.add(item, "exact", "a task")
            found.append(reference.model)
    return found


def _weights(top: Marked, count: int, notes: Notes) -> list[float]:
    at = top.get("weights")
    found = [as_number(item.value) for item in (at.items or ())] if at else []
    numbers = [number for number in found if number is not None]
    if at is None or len(numbers) != count or len(found) != count:
        notes.lose(at or top, f"expected weights: a list of {count} numbers")
        return []
    notes.add(at, "rounding", "coefficients of the products")
    return numbers


def _bound_rank(top: Marked, places: Sequence[Place], models: Models, notes: Notes) -> dict[str, int]:
    """Note how the adapters are combined, and return the `rank` to which that cuts the product, if to any."""
    where = top.get("combination_type") or top
    way = _DEFAULT if where is top else str(where.plain())
    if way not in _WAYS:
        hint = nearest(way, [*_WAYS])
        notes.lose(where, f"{shown(way, 40)} is no way in which PEFT 0.21 combines adapters; {hint}")
        return {}
    rank = None
    if way == "svd":
        rank = _svd_rank(top, where, places, models, notes)
    elif way == "cat" or (way == "linear" and len(places) == 1):
        notes.add(where, "rounding", "the weighted sum of the products, as one adapter")
    else:
        notes.lose(where, _WAYS[way])
    if way in ("cat", "svd"):
        _check_factors(where, places, models, notes)
    return {} if rank is None else {"rank": rank}


def _check_factors(where: Marked, places: Sequence[Place], models: Models, notes: Notes) -> None:
    """Note adapters whose product PEFT multiplies by another factor than their own."""
    for place in places:
        facts = models.facts(place)
        if facts is not None and facts.is_rank_stabilised:
            notes.lose(where, f"{place.path} is rank-stabilised, and PEFT gives its product a wrong factor")


def _svd_rank(
    top: Marked, where: Marked, places: Sequence[Place], models: Models, notes: Notes
) -> int | None:
    """Return the rank to which PEFT cuts the product, by default that of the widest; None: to none."""
    at, clamp = top.get("svd_rank") or where, top.get("svd_clamp")
    if clamp is not None:
        notes.lose(clamp, "values of factors that are cut off")
    ranks = _ranks(places, models)
    if ranks is None:
        notes.lose(at, "whether the rank cuts anything off: the adapters could not be read")
        return None
    number = max(ranks) if at is where else as_number(at.value)
    if number is None or number < 1 or number != int(number):
        notes.lose(at, "expected a whole number from 1")
        return None
    if number >= sum(ranks):
        notes.add(at, "rounding", "as wide as all adapters together, so that nothing is cut off")
        return None
    notes.add(at, "rounding", f"output.rank: the product, of a rank up to {sum(ranks)}, is cut to it")
    return int(number)


def _ranks(places: Sequence[Place], models: Models) -> list[int] | None:
    """Return the ranks of adapters; None where one is not known."""
    facts = [models.facts(place) for place in places]
    found = [one.rank for one in facts if one is not None and one.rank is not None]
    return found if found and len(found) == len(places) else None


def _base(top: Marked, places: Sequence[Place], models: Models, notes: Notes) -> str | None:
    """Return the base model: as written, or as the adapters say."""
    at = top.get("base_model")
    if at is not None:
        reference = read_reference(at)
        if isinstance(reference, str):
            notes.lose(at, reference)
            return None
        notes.add(at, "exact", "base_model")
        return models.written(reference.model)
    facts = [models.facts(place) for place in places]
    stated = {one.adapter_base for one in facts if one is not None and one.adapter_base}
    if len(stated) == 1:
        return models.written(Place(stated.pop()))
    notes.lose(top, "the adapters name no common base model: write base_model: in the file")
    return None
