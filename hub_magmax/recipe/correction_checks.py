"""Checks of a correction of the merged model's representation against the other keys of its recipe."""

from __future__ import annotations

from collections.abc import Iterator

from hub_magmax.errors import KeyPath, Problem
from hub_magmax.recipe.problems import conflict
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import AUTO


def correction_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what a correction does not go with: an adapter, an own tokenizer, merges that are tried."""
    if recipe.correction is None:
        return
    if recipe.output.is_adapter:
        text = "an adapter has no head that a correction could be folded into"
        yield conflict(("output", "format"), text, "output.format: weights, or leave correction out")
    if recipe.tokenizer is not None:
        text = "a correction is made by runs of the merged model, whose tokenizer is not written yet"
        yield conflict(("tokenizer",), text, "leave it out, or leave correction out")
    if recipe.preference is not None and recipe.preference.coefficients is not None:
        text = "a correction weighs the tasks by shares, and coefficients are none"
        yield conflict(("preference", "coefficients"), text, "use weights, or leave correction out")
    for path in _trials(recipe):
        text = "models that are tried are merged without the correction"
        yield conflict(path, text, "leave it out, or find the values first without correction and write them")


def _trials(recipe: Recipe) -> Iterator[KeyPath]:
    """Yield the keys by which models are merged to be compared."""
    if recipe.method.is_auto:
        yield "method", "name" if recipe.method.name == AUTO else "scaling"
    if recipe.preference is not None and recipe.preference.is_searched:
        yield "preference", recipe.preference.kind
    elif recipe.preference is not None and getattr(recipe.preference.spec, "holdout", None):
        yield "preference", recipe.preference.kind, "holdout"
    if recipe.compare is not None:
        yield ("compare",)
