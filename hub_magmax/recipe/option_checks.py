"""Checks of options of methods that have a value for each task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from hub_magmax import methods
from hub_magmax.errors import KeyPath, Problem, RecipeError
from hub_magmax.options import per_task
from hub_magmax.recipe.problems import conflict
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.tensor_rules import is_gradient
from hub_magmax.recipe.values import AUTO
from hub_magmax.text import listed


def _options_by_task(recipe: Recipe) -> Iterator[tuple[KeyPath, Mapping[str, Any]]]:
    """Yield every option with values by task, and its key path."""
    written: dict[KeyPath, tuple[str, Mapping[str, Any]]] = {
        ("method",): (recipe.method.name, recipe.method.options)
    }
    compared = recipe.compare.tried_methods if recipe.compare else ()
    written |= {("compare", "methods", n): (method.name, method.options) for n, method in enumerate(compared)}
    written |= {("tensors", n, "options"): (recipe.method.name, own) for n, own in _of_rules(recipe)}
    for path, (name, options) in written.items():
        with suppress(RecipeError):  # reported with the name
            entry = methods.get_method(name) if name != AUTO else None
            found = per_task(entry, options) if entry is not None else {}
            yield from (((*path, name), by_task) for name, by_task in found.items())


def _of_rules(recipe: Recipe) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the options of each rule but numbers over the blocks, with the rule's position."""
    for position, rule in enumerate(recipe.tensors):
        yield position, {name: v for name, v in (rule.options or {}).items() if not is_gradient(v)}


def missed_tasks(recipe: Recipe) -> Iterator[Problem]:
    """Yield the options with values by task that miss some of the tasks."""
    for path, by_task in _options_by_task(recipe):
        if missing := [task for task in recipe.task_names if task not in by_task]:
            hint = "name every task, or write one value for all"
            yield conflict(path, f"there is no {path[-1]} for {listed(missing)}", hint)


def option_tasks(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Yield the tasks that options name, each with its key path."""
    for path, by_task in _options_by_task(recipe):
        yield from (((*path, task), task) for task in by_task)
