"""Checks of an evaluation against the tasks, and against what its evaluator can do."""

from __future__ import annotations

from collections.abc import Iterator

from hub_magmax.errors import Problem
from hub_magmax.recipe.problems import conflict
from hub_magmax.recipe.schema import Recipe
from hub_magmax.registry import EVALUATORS


def guard_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield guards that are called like a task."""
    for name in recipe.evaluation.guard if recipe.evaluation else ():
        if name in recipe.task_names:
            yield conflict(("evaluation", "guard", name), "this is the name of a task", "choose another one")


def prompt_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield keys of prompts where the evaluator has none: they would be left out in silence."""
    if recipe.evaluation is None:
        return
    name = recipe.evaluation.evaluator.name
    if not EVALUATORS.knows(name) or getattr(EVALUATORS.get(name).make, "has_prompts", False):
        return  # an unknown one is reported with its name
    for part, found in (("tasks", recipe.evaluation.tasks), ("guard", recipe.evaluation.guard)):
        for task, data in found.items():
            for key in data.prompt_keys:
                yield conflict(
                    ("evaluation", part, task, key),
                    f"the evaluator {name} has no prompts",
                    "leave the key out, or choose another evaluator",
                )
