"""Checks of an evaluation against the tasks, and against what its evaluator can do."""

from __future__ import annotations

from collections.abc import Iterator

from hub_magmax.errors import KeyPath, Problem
from hub_magmax.recipe.problems import conflict
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import Data
from hub_magmax.registry import EVALUATORS


def guard_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield guards that are called like a task."""
    for name in recipe.evaluation.guard if recipe.evaluation else ():
        if name in recipe.task_names:
            yield conflict(("evaluation", "guard", name), "this is the name of a task", "choose another one")


def rounding_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what quantised models lack: examples for GPTQ, or anything to round to."""
    spec = recipe.evaluation
    if spec is None:
        return
    if spec.needs_calibration and spec.calibration is None:
        text, hint = "GPTQ needs examples, whose labels play no part", "write calibration: {dataset: ...}"
        yield conflict(("evaluation", "quantized"), text, hint)
    if spec.needs_calibration and _has(spec.evaluator.name, "brings_data"):
        text = f"{spec.evaluator.name} brings its own examples, and GPTQ needs those of calibration"
        hint = "round to the nearest, such as int4, or name another evaluator"
        yield conflict(("evaluation", "quantized"), text, hint)
    unused = [] if spec.quantized else ["quantized_models"]
    unused += [] if spec.needs_calibration else ["calibration"]
    for key in unused:
        if getattr(spec, key) is not None:
            hint = "write quantized: [int3, int3-gptq], or leave it out"
            yield conflict(("evaluation", key), "nothing is rounded by it", hint)


def prompt_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield keys of prompts where the evaluator has none: they would be left out in silence."""
    spec = recipe.evaluation
    if spec is None:
        return
    read: dict[KeyPath, Data] = {}
    read |= {("evaluation", "tasks", task): data for task, data in spec.tasks.items()}
    read |= {("evaluation", "guard", name): data for name, data in spec.guard.items()}
    if spec.calibration is not None:
        read["evaluation", "calibration"] = spec.calibration
    if recipe.routing is not None:
        read |= {("routing", "tasks", task): data for task, data in recipe.routing.tasks.items()}
    for path, data in read.items():
        yield from unread_prompts(spec.evaluator.name, path, data)


def routing_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield why a router cannot be fitted to the examples of `routing`."""
    if recipe.routing is None:
        return
    if recipe.evaluation is None:
        text = "no evaluation measures a router that is fitted to these examples"
        yield conflict(("routing",), text, "name other examples of each task under evaluation")
        return
    for name in recipe.evaluation.tasks:
        if name not in recipe.routing.tasks:
            text = f"there are no examples of {name}, on which the router is measured"
            yield conflict(("routing", "tasks"), text, f"name some, as evaluation.tasks.{name} does")


def unread_prompts(evaluator: str, path: KeyPath, data: Data) -> Iterator[Problem]:
    """Yield the keys of prompts of data that an evaluator does not read.

    Args:
        evaluator: Its name; an unknown one is reported elsewhere.
        path: Of the data.
        data: Names the examples.
    """
    if not EVALUATORS.knows(evaluator) or _has(evaluator, "has_prompts"):
        return
    for key in data.prompt_keys:
        yield conflict(
            (*path, key),
            f"the evaluator {evaluator} has no prompts",
            "leave the key out, or choose another evaluator",
        )


def _has(evaluator: str, property: str) -> bool:
    """Say whether all evaluators of a name have a property; false of unknown ones."""
    return EVALUATORS.knows(evaluator) and bool(getattr(EVALUATORS.get(evaluator).make, property, False))
