"""Families of checkpoints that are there already: a recipe's, with the examples that it evaluates on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.continual.sources import Family, joined
from hub_magmax.checkpoints.locations import location_of
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators import brings_data, evaluator_of, needs_labels
from hub_magmax.evaluation.scoring import load_evaluation_data
from hub_magmax.pipeline import lock
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.schema import Recipe

if TYPE_CHECKING:
    from datasets import Dataset


def own_family(path: Path, seed: int) -> Family:
    """Return the base model and the tasks' checkpoints of a recipe, in its order, as a family.

    Its `evaluation` names the evaluator, and for every task the examples that targets are drawn from. The
    preference of a target is estimated from labels where no two tasks share one, and is the known mixing
    ratio otherwise.

    Args:
        path: The recipe.
        seed: Of all draws; several sequences that were learned alike get one each.

    Raises:
        EvaluationError: If a task has no examples, or tasks name their columns differently.
    """
    recipe = load_recipe(path)
    examples = _examples(recipe, path)
    evaluator = evaluator_of(recipe.evaluation) if recipe.evaluation else None
    assert recipe.evaluation is not None and evaluator is not None, "checked with the examples"
    locked = lock(recipe, hash_files=True)
    places = {
        name: Path(location_of(source, recipe.folder).model_place.name)
        for name, source in locked.sources.items()
    }
    columns = recipe.evaluation.tasks[recipe.task_names[0]]
    classes = _classes(examples, columns.label_column) if needs_labels(evaluator) else {}
    test, owners = joined(examples)
    return Family(
        f"t{len(examples)}s{seed}",
        seed,
        places.pop("base_model"),
        places,
        test,
        owners,
        columns,
        {"name": recipe.evaluation.evaluator.name, **recipe.evaluation.evaluator.options},
        kinds=("labels",) if classes else ("known",),
        classes=classes,
        num_train=0,
        recipe=recipe,
        identity=locked.digest,
    )


def _examples(recipe: Recipe, path: Path) -> dict[str, Dataset]:
    """Return the examples of every task, in the recipe's order, with the columns of the first."""
    spec = recipe.evaluation
    missing = [task for task in recipe.task_names if spec is None or task not in spec.tasks]
    if spec is None or missing:
        raise EvaluationError(
            f"{', '.join(missing)}: no examples to draw targets from",
            where=f"{path}, evaluation.tasks",
            expected="examples for every task",
        )
    if brings_data(evaluator_of(spec)):
        raise EvaluationError(
            f"{spec.evaluator.name} brings its own examples, and targets mix those of several tasks",
            where=f"{path}, evaluation.evaluator",
            expected="an evaluator of examples that the recipe names",
        )
    columns = {(spec.tasks[task].input_column, spec.tasks[task].label_column) for task in recipe.task_names}
    if len(columns) > 1:
        raise EvaluationError(
            "tasks name their columns differently",
            where=f"{path}, evaluation.tasks",
            expected="the same input_column and label_column for every task",
        )
    found = load_evaluation_data(recipe, lock(recipe))
    first = found[recipe.task_names[0]]
    return {task: found[task].cast(first.features) for task in recipe.task_names}


def _classes(examples: Mapping[str, Dataset], column: str) -> dict[str, tuple[int, ...]]:
    """Return the labels of each task; nothing where two tasks share one."""
    found = {task: tuple(sorted(set(part[column]))) for task, part in examples.items()}
    count = sum(map(len, found.values()))
    return found if len({label for labels in found.values() for label in labels}) == count else {}
