"""Checks of a recipe's training, and of rounds of it, against its tasks and what its evaluator can do."""

from __future__ import annotations

import os
from collections.abc import Iterator

from hub_magmax.errors import Problem
from hub_magmax.recipe.evaluation_checks import unread_prompts
from hub_magmax.recipe.problems import conflict
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.statistics_checks import is_local
from hub_magmax.recipe.training import MERGE, MOMENTUM
from hub_magmax.recipe.values import EvaluatorChoice
from hub_magmax.registry import EVALUATORS


def training_evaluator(recipe: Recipe) -> EvaluatorChoice:
    """Return what says how models read examples in training: its own evaluator, or the evaluation's."""
    own = recipe.training.evaluator if recipe.training else None
    return own or (recipe.evaluation.evaluator if recipe.evaluation else EvaluatorChoice())


def training_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what keeps the recipe's training from making the checkpoints that the recipe merges."""
    spec = recipe.training
    if spec is None:
        return
    yield from _place_problems(recipe)
    yield from _base_problems(recipe)
    yield from _lora_problems(recipe)
    name = training_evaluator(recipe).name
    if not EVALUATORS.knows(name):
        return  # reported with its name
    if not hasattr(EVALUATORS.get(name).make, "losses"):
        key = ("training", "evaluator") if spec.evaluator else ("training",)
        hint = "name one that has, such as evaluator: text-classification"
        yield conflict(key, f"the evaluator {name} has no loss to train by", hint)
    for task, data in spec.data.items():
        yield from unread_prompts(name, ("training", "data", task), data)
    if spec.capability is not None:
        yield from unread_prompts(name, ("training", "capability", "data"), spec.capability.data)


def _lora_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what says something else than adapters of the base model that are trained alone."""
    spec = recipe.training
    if spec is None or spec.lora is None:
        return
    if spec.frozen:
        text = "an adapter is trained, and everything else is frozen already"
        yield conflict(("training", "frozen"), text, "leave it out, or name layers by training.lora.targets")
    if spec.quantization_aware is not None:
        text = "weights that are rounded are those of a whole checkpoint, and lora trains an adapter"
        yield conflict(("training", "quantization_aware"), text, "leave it out, or lora")
    if recipe.adapters == "sequence":
        text = "adapters that `finetune` trains are of the base model, also where each goes on from another"
        yield conflict(("adapters",), text, "leave it out")


def is_made_by_training(recipe: Recipe, written: str) -> bool:
    """Say whether `finetune` writes the checkpoint that the recipe calls `written`."""
    trained = recipe.training.data if recipe.training else {}
    return any(task.model == written and task.name in trained for task in recipe.tasks)


def _place_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield tasks with training data that have no folder of their own on this machine."""
    assert recipe.training is not None
    folders = {"base_model": _folder(recipe, recipe.base_model)}
    for number, task in enumerate(recipe.tasks):
        key = ("tasks", number, "model")
        if task.name in recipe.training.data and not is_local(recipe, task.model):
            text = f"{task.model!r} is no folder here, and `finetune` writes checkpoints into folders"
            yield conflict(
                key, text, f"write ./{task.model}, or leave out training.data.{task.name} of a finished one"
            )
        folder = _folder(recipe, task.model)
        other = next((name for name, found in folders.items() if found == folder), None)
        if other is not None and task.name in recipe.training.data:
            text = f"this is the checkpoint of {other} too"
            yield conflict(key, text, "give each task that is trained a folder of its own")
        folders[task.name] = folder


def _folder(recipe: Recipe, place: str) -> str:
    return os.path.normpath(recipe.folder / place) if is_local(recipe, place) else place


def _base_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield bases of tasks that a sequence does not begin at."""
    if recipe.training is None or recipe.training.order == "from_base":
        return
    for number, task in enumerate(recipe.tasks):
        if task.base is not None and task.name in recipe.training.data:
            text = "in a sequence a task begins at the task before it, not at a base of its own"
            yield conflict(("tasks", number, "base"), text, "leave it out, or write order: from_base")


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
