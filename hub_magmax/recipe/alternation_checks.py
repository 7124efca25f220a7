"""Checks of rounds of fine-tuning and merging against the other keys of a recipe."""

from __future__ import annotations

from collections.abc import Iterator

from hub_magmax.errors import Problem
from hub_magmax.recipe.alternation import MERGE, MOMENTUM
from hub_magmax.recipe.problems import conflict
from hub_magmax.recipe.schema import Recipe


def alternation_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what keeps every task of a round from the round's model, or the merge from the next round."""
    spec = recipe.training
    if spec is None or spec.alternate is None:
        return
    if spec.order != "from_base":
        text = "in a round every task begins at the same model, and here at the task before it"
        yield conflict(("training", "order"), text, "write order: from_base")
    if recipe.sites is not None:
        text = "a round ends with one model, and sites are several"
        yield conflict(("sites",), text, "leave it out, and write a recipe for each site")
    if recipe.output.format not in (None, "weights"):
        text = f"a round begins at a whole model, which output.format: {recipe.output.format} is not"
        yield conflict(("output", "format"), text, "leave it out")
    yield from _task_problems(recipe)


def _task_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield tasks that rounds cannot train, and names that their steps need."""
    assert recipe.training is not None
    for number, task in enumerate(recipe.tasks):
        if task.name not in recipe.training.data:
            text = f"there is no data to train {task.name} on in every round"
            yield conflict(("training", "data"), text, f"name it: {task.name}: {{dataset: ...}}")
        if task.base is not None:
            text = "in rounds a task begins at the round's model, not at a base of its own"
            yield conflict(("tasks", number, "base"), text, "leave it out")
        if task.name in (MERGE, MOMENTUM):
            text = f"{task.name!r} is what a round's step calls a part of its own"
            yield conflict(("tasks", number, "name"), text, "choose another name")
