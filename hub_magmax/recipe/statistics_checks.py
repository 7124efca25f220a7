"""Statistics of tasks' data that a recipe's methods need: their kinds and files, and checks of the keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from hub_magmax import methods
from hub_magmax.errors import KeyPath, Problem, RecipeError
from hub_magmax.methods.data_statistics import KINDS, OF_THE_MERGE, REPRESENTATION, StatisticsKind
from hub_magmax.recipe.model_names import is_there
from hub_magmax.recipe.problems import conflict
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import AUTO


def statistics_kinds(recipe: Recipe) -> tuple[StatisticsKind, ...]:
    """Return the kinds of statistics that the recipe's methods and its correction need."""
    needed = {kind for _, kind in _needs(recipe)}
    return tuple(kind for kind in (*KINDS, REPRESENTATION) if kind in needed)


def files_of(recipe: Recipe, kind: StatisticsKind) -> dict[str, str]:
    """Return the file of each task's statistics of a kind, as a recipe could name it, by task."""
    named = ((task.name, task.statistics) for task in recipe.tasks)
    return {name: _inside(recipe, place, kind) for name, place in named if place is not None}


def _inside(recipe: Recipe, place: str, kind: StatisticsKind) -> str:
    """Return the name of a file in a folder, or in a repository."""
    start = place.rstrip("/")
    is_plain = is_local(recipe, place) or "://" in place
    return f"{start if is_plain else f'hf://{start}'}/{kind}.safetensors"


def is_local(recipe: Recipe, place: str) -> bool:
    """Say whether a folder of statistics is on this machine, or can be made there."""
    return place.startswith((".", "/", "~")) or is_there(recipe.folder / place)


def statistics_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what lacks for methods, and for a correction, that need statistics of each task's data."""
    needs = list(_needs(recipe))
    without = [task.name for task in recipe.tasks if task.statistics is None]
    if needs and without:
        path, kind = needs[0]
        yield conflict(
            path,
            f"this needs {kind} statistics of each task's data, and {', '.join(without)} have none",
            f"name a folder for them, such as statistics: ./statistics/{without[0]}, beside the task's model",
        )
    if needs and recipe.layers:
        text = "statistics are about the base model's own blocks"
        yield conflict(("layers",), text, f"leave layers out, or {_without(needs[0][0])}")
    if needs:
        yield from _places_problems(recipe)
    if OF_THE_MERGE in {kind for _, kind in needs}:
        yield from _merge_problems(recipe)


def _without(path: KeyPath) -> str:
    """Say how a recipe does without statistics."""
    return "leave correction out" if path == ("correction",) else "choose a method that needs no statistics"


def _merge_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what statistics of the merge itself cannot follow."""
    if recipe.method.scaling not in (None, 1):
        text = "the statistics of this method are of a merge with scaling 1"
        yield conflict(("method", "scaling"), text, "leave it out, or choose regmean")
    for key in ("tensors", "token_rows", "tokenizer"):
        if getattr(recipe, key):
            text = "the statistics of this method are of a merge without rules"
            yield conflict((key,), text, "leave it out, or choose regmean")
    if recipe.norms is not None:
        text = "the statistics of this method are of task vectors as long as they are"
        yield conflict(("norms",), text, "leave it out, or choose regmean")
    for number, task in enumerate(recipe.tasks):
        if task.base is not None:
            text = "the statistics of this method are of tasks that share the base model"
            yield conflict(("tasks", number, "base"), text, "leave it out, or choose regmean")


def _places_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield repositories in which statistics would have to be made."""
    data = recipe.statistics.data if recipe.statistics is not None else {}
    for number, task in enumerate(recipe.tasks):
        if task.name in data and task.statistics and not is_local(recipe, task.statistics):
            yield conflict(
                ("tasks", number, "statistics"),
                f"{task.statistics!r} is a repository on the Hub, and statistics are made in a folder here",
                f"write ./{task.statistics}, or leave out statistics.data of {task.name}",
            )


def _needs(recipe: Recipe) -> Iterator[tuple[KeyPath, StatisticsKind]]:
    """Yield the key paths of what needs statistics, and of which kind."""
    named: dict[KeyPath, str] = {("method", "name"): recipe.method.name}
    for number, method in enumerate((recipe.compare and recipe.compare.methods) or ()):
        named["compare", "methods", number] = method.name
    for path, name in named.items():
        with suppress(RecipeError):  # reported with the name
            if name != AUTO and (kind := methods.get_method(name).statistics) is not None:
                yield path, kind
    if recipe.correction is not None:
        yield ("correction",), REPRESENTATION
