"""Recipes of rounds: each trains every task from the current model, and merges them; some take a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub_magmax.errors import OutputError
from hub_magmax.files import from_here
from hub_magmax.recipe.loading import load_recipe, parse_recipe
from hub_magmax.recipe.model_names import is_there
from hub_magmax.recipe.schema import RECIPE_NAME, Recipe
from hub_magmax.recipe.training import MERGE, MOMENTUM, Alternate
from hub_magmax.training.order import seed_of


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        number: From 1.
        merge: Trains the tasks from the current model, and merges them.
        step: Goes from the current model towards the merged one; None where the merged one is the round's.
        folder: Of the checkpoints, and of the model unless that is the last.
    """

    number: int
    merge: Recipe
    step: Recipe | None
    folder: Path

    @property
    def recipe(self) -> Recipe:
        """The recipe whose output is the round's model."""
        return self.step or self.merge

    @property
    def model(self) -> Path:
        return self.recipe.output_path

    @property
    def is_finished(self) -> bool:
        return is_there(self.model)

    def check_same(self) -> None:
        """Raise OutputError if a finished model of this round is that of another recipe."""
        for wanted in filter(None, (self.merge, self.step)):
            folder = wanted.output_path
            if not is_there(folder):
                continue
            if load_recipe(folder / RECIPE_NAME, folder=wanted.folder).digest != wanted.portable.digest:
                raise OutputError(
                    f"round {self.number} was made by another recipe, which rounds cannot go on from",
                    where=from_here(folder),
                    expected="the recipe as it was when its rounds began",
                    hint=f"Name another output.path; or delete {from_here(self.folder.parent)}, and they "
                    "begin anew.",
                )


def rounds_of(recipe: Recipe) -> tuple[Round, ...]:
    """Return all rounds of a recipe whose `training` has `alternate`, in order.

    The last one has the recipe's own output; what the others make is beside it, in `OUTPUT.rounds`. Seeds of
    the first round are the recipe's own, and those of every other round are drawn from them.
    """
    spec = recipe.training.alternate if recipe.training else None
    assert spec is not None
    place = _written(recipe.output.path)
    models = [recipe.base_model, *(f"{place}.rounds/{number}/model" for number in range(1, spec.rounds))]
    return tuple(
        _round(recipe, spec, number, f"{place}.rounds/{number}", models)
        for number in range(1, spec.rounds + 1)
    )


def _written(path: str) -> str:
    """Return a path as one that is taken for nothing else."""
    path = path.rstrip("/")
    return path if path.startswith((".", "/", "~")) else f"./{path}"


def _round(recipe: Recipe, spec: Alternate, number: int, place: str, models: list[str]) -> Round:
    final = recipe.to_dict(defaults=False).get("output", {})
    inner = {key: value for key, value in final.items() if key not in ("push_to_hub", "keep", "private")}
    outer = final if number == spec.rounds else inner | {"path": f"{place}/model"}
    has_step = spec.has_step(number)
    merge = _merge_values(recipe, number, place, models[number - 1])
    merge["output"] = inner | {"path": f"{place}/merged"} if has_step else outer
    step = None
    if has_step:
        step = _parsed(recipe, _step_values(merge, spec, place, models[:number]) | {"output": outer}, number)
    return Round(number, _parsed(recipe, merge, number), step, recipe.folder / place)


def _parsed(recipe: Recipe, values: dict[str, Any], number: int) -> Recipe:
    return parse_recipe(values, folder=recipe.folder, where=f"round {number}")


def _merge_values(recipe: Recipe, number: int, place: str, model: str) -> dict[str, Any]:
    """Return the values of a round's merge, but for its output."""
    assert recipe.training is not None
    values = recipe.to_dict(defaults=False)
    values |= {"schema": 1, "base_model": model, "tasks": [_task(task, place) for task in values["tasks"]]}
    values["training"] = {key: value for key, value in values["training"].items() if key != "alternate"}
    if number > 1:
        values["seed"] = _seed(recipe.seed, number)
        if recipe.training.seed is not None:
            values["training"]["seed"] = _seed(recipe.training.seed, number)
    values.pop("sweep", None)
    return values


def _seed(seed: int, number: int) -> int:
    return seed_of(seed, f"round {number}")


def _task(task: dict[str, Any], place: str) -> dict[str, Any]:
    found = task | {"model": f"{place}/tasks/{task['name']}"}
    return found | {"statistics": f"{place}/statistics/{task['name']}"} if "statistics" in task else found


def _step_values(merge: dict[str, Any], spec: Alternate, place: str, models: list[str]) -> dict[str, Any]:
    """Return the values of the recipe of a step, but for its output.

    From the model θ it goes to θ + s · ((1 − m) (merged − θ) + m (θ − before)), as sums of task vectors. The
    round's own tasks have the coefficient 0: they are there to be scored.

    Args:
        merge: Values of the round's merge.
        spec: Step s and momentum m.
        place: Of the round.
        models: At which the rounds until this one began.
    """
    momentum = spec.momentum if len(models) > 1 else 0.0
    tasks = [*merge["tasks"], {"name": MERGE, "model": f"{place}/merged"}]
    coefficients = {task["name"]: 0.0 for task in merge["tasks"]} | {MERGE: 1 - momentum}
    if momentum:
        tasks.append({"name": MOMENTUM, "model": models[-1], "base": models[-2]})
        coefficients[MOMENTUM] = momentum
    kept = ("schema", "base_model", "training", "evaluation", "seed", "trusted_links")
    return {key: merge[key] for key in kept if key in merge} | {
        "tasks": [{key: value for key, value in task.items() if key != "statistics"} for task in tasks],
        "method": {"name": "task_arithmetic", "scaling": spec.step},
        "preference": {"coefficients": coefficients},
    }
