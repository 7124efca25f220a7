"""Checks of a recipe's output: where it goes, and what an adapter or a selection cannot hold."""

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
