"""Checkpoints that tasks' trainings begin at: by the recipe's order, whole models or adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hub_magmax.checkpoints.pinning import lock_source
from hub_magmax.errors import RecipeError
from hub_magmax.recipe.lockfile import LockedSource
from hub_magmax.recipe.schema import Recipe, Task


@dataclass(frozen=True)
class Start:
    """Checkpoint that the training of one task begins at.

    Attributes:
        name: As the recipe writes it.
        model: Whole model whose network is trained.
        adapter: Adapter of that model that the training goes on with, or None.
    """

    name: str
    model: LockedSource
    adapter: LockedSource | None = None

    @property
    def hashes(self) -> dict[str, str | None]:
        """The sha256 of all weight files that it has, by path; those below an adapter say so."""
        if self.adapter is None:
            return {file.path: file.sha256 for file in self.model.files}
        below = {f"base model, {file.path}": file.sha256 for file in self.model.files}
        return {file.path: file.sha256 for file in self.adapter.files} | below


def start_name(recipe: Recipe, task: Task) -> str:
    """Return the name of the checkpoint that a task begins at."""
    assert recipe.training is not None
    if recipe.training.order == "from_base":
        return task.base or recipe.base_model
    before = recipe.tasks[: recipe.task_names.index(task.name)]
    return before[-1].model if before else recipe.base_model


def base_name(recipe: Recipe, task: Task) -> str:
    """Return the name of the whole model that a task's adapter is trained for."""
    return task.base or recipe.base_model


def known_starts(recipe: Recipe, tasks: Sequence[Task]) -> Iterator[LockedSource]:
    """Yield the checkpoints that tasks begin at, but for those that are trained first.

    Raises:
        RecipeError: As `locked_start`.
        MissingDependencyError: If tasks are trained by PEFT, which is not installed.
    """
    if tasks and recipe.training is not None and recipe.training.lora is not None:
        from hub_magmax.training.adapters import peft_library

        peft_library()
    made = {task.model for task in tasks}
    starts = {start_name(recipe, task): task for task in tasks}
    for start, task in starts.items():
        if start not in made:
            locked = lock_source(recipe, start)
            check_kind(recipe, task, locked)
            yield locked


def locked_start(recipe: Recipe, task: Task) -> Start:
    """Return the checkpoint that a task begins at, with the sha256 of its files.

    Raises:
        CheckpointError: If it is malformed.
        RecipeError: If an adapter is to be trained after a whole checkpoint, or the other way round.
    """
    assert recipe.training is not None
    name, base = start_name(recipe, task), base_name(recipe, task)
    found = lock_source(recipe, name, hash_files=True)
    check_kind(recipe, task, found)
    if name == base or recipe.training.lora is None:
        return Start(name, found)
    return Start(name, lock_source(recipe, base, hash_files=True), found)


def check_kind(recipe: Recipe, task: Task, start: LockedSource) -> None:
    """Raise RecipeError where a task cannot begin at a checkpoint, since one is an adapter and one is not."""
    assert recipe.training is not None
    has_lora = recipe.training.lora is not None
    goes_on = has_lora and start_name(recipe, task) != base_name(recipe, task)
    if goes_on == (start.adapter_config is not None):
        return
    if goes_on:
        text = f"{task.name} begins at {start.label}, a whole checkpoint, and so its adapter would not be of "
        text += base_name(recipe, task)
        hint = "Write order: from_base; or train the tasks before it with lora too."
    else:
        text = f"{task.name} begins at {start.label}, which is an adapter and no whole model"
        hint = "Write order: from_base, or training.lora with the adapter's rank; or merge the adapter first."
    raise RecipeError(text, key=("training", "order"), hint=hint)
