"""Checks of tasks' own base models against the other keys of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from hub_magmax import methods
from hub_magmax.errors import KeyPath, Problem, RecipeError
from hub_magmax.recipe.problems import conflict
from hub_magmax.recipe.schema import Compare, Recipe
from hub_magmax.recipe.values import AUTO


def own_base_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what cannot be done with a task that was fine-tuned from another base model."""
    for number, task in enumerate(recipe.tasks):
        if task.base is None:
            continue
        key: KeyPath = ("tasks", number, "base")
        if recipe.adapters == "sequence":
            text = "an adapter of a sequence is added to the checkpoint of the task before it"
            yield conflict(key, text, "leave base out, or adapters: sequence")
        if recipe.matches_tokens:
            text = "rows are matched by token with those of one base model"
            yield conflict(key, text, "leave base out, or token_rows and tokenizer")
        for path, name in _methods(recipe):
            if _compares_models(name):
                yield conflict(
                    path,
                    f"{name} is about whole models, and {task.name} counts by its change of another one",
                    "choose a method that adds task vectors, or leave base out",
                )


def _methods(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Yield the methods that a recipe merges by, each with its key path."""
    yield ("method", "name"), recipe.method.name
    if recipe.compare is not None or recipe.method.name == AUTO:
        tried = (recipe.compare or Compare()).methods or ()
        yield from ((("compare", "methods", number), method.name) for number, method in enumerate(tried))


def _compares_models(name: str) -> bool:
    with suppress(RecipeError):  # reported with the name
        return name != AUTO and "base" in methods.get_method(name).supplied
    return False
