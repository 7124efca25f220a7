"""Checks of a recipe's output: its place, what an adapter or a selection cannot hold, and its correction."""

from __future__ import annotations

from collections.abc import Iterator

from hub_magmax import methods
from hub_magmax.errors import KeyPath, Problem, RecipeError
from hub_magmax.recipe.problems import conflict
from hub_magmax.recipe.schema import Compare, Recipe
from hub_magmax.recipe.values import AUTO

#: Methods that take every element from one task.
SELECTING = ("tunable_magmax", "magmax", "random_mix")


def output_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield keys of the output that do not go together."""
    if recipe.output.rank is not None and not recipe.output.is_adapter:
        text = "whole weights have no rank"
        yield conflict(("output", "rank"), text, "leave it out, or write an adapter: output.format: adapter")
    if not recipe.output.keep and recipe.output.push_to_hub is None:
        text = "without a folder the model must go to the Hub"
        yield conflict(("output", "keep"), text, "name output.push_to_hub")


def adapter_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what cannot be written as an adapter, where the recipe asks for one."""
    if not recipe.output.is_adapter:
        return
    yield from _token_problems(recipe)
    for path, name in _used_methods(recipe).items() if recipe.output.rank is None else ():
        if name != AUTO and not _gives_products(name):
            yield conflict(
                path,
                f"{name} is not linear, so what it gives is no adapter",
                f"linear are {', '.join(methods.linear_names())}; {', '.join(methods.factored_names())} give "
                "adapters too; every method gives one of a bound rank, output.rank: 16, and "
                "output.format: weights takes every method",
            )


def selection_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what cannot be written as a selection, where the recipe asks for one."""
    if not recipe.output.is_selection:
        return
    if not recipe.output.keep:
        text = "a selection is made in a folder"
        yield conflict(("output", "keep"), text, "leave it out, or output.format: weights")
    if recipe.evaluation is not None:
        text = "a selection holds no weights that could be scored"
        yield conflict(("evaluation",), text, "leave it out, or output.format: weights")
    for path, name in _used_methods(recipe).items():
        if name != AUTO and name not in SELECTING:
            text = f"{name} does not take every element from one task, so what it gives is no selection"
            hint = f"{', '.join(SELECTING)} do; output.format: weights takes every method"
            yield conflict(path, text, hint)


def _used_methods(recipe: Recipe) -> dict[KeyPath, str]:
    """Return the names of the method and of those that are compared, by their place in the recipe."""
    used: dict[KeyPath, str] = {("method", "name"): recipe.method.name}
    if recipe.compare is not None or recipe.method.name == AUTO:
        tried = (recipe.compare or Compare()).tried_methods
        used |= {("compare", "methods", index): method.name for index, method in enumerate(tried)}
    return used


def _token_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is said of tokens, which an adapter does not have."""
    for key in ("token_rows", "tokenizer"):
        if getattr(recipe, key):
            text = "an adapter has no rows of tokens, and no tokenizer"
            yield conflict((key,), text, "leave this out, or output.format: adapter")


def _gives_products(name: str) -> bool:
    try:
        method = methods.get_method(name)
        return method.form == "linear" or method.takes_factors
    except RecipeError:
        return True  # reported with the name


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
