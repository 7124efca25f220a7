"""Recipe and lock as the command line names them, and those of a merged model."""

from __future__ import annotations

from pathlib import Path

from hub_magmax.cli.options import RecipeOptions
from hub_magmax.errors import OutputError
from hub_magmax.files import write_text
from hub_magmax.recipe.loading import load_recipe, updated
from hub_magmax.recipe.lockfile import LOCK_NAME, Lock, read_lock
from hub_magmax.recipe.matching import check_lock
from hub_magmax.recipe.result_files import ResultFiles, beside
from hub_magmax.recipe.schema import Recipe


def lock_beside(recipe: Path) -> Path:
    """Return the path of a recipe's lock: `mix.lock.json` for `mix.yaml`."""
    return beside(recipe).path("lock.json")


def files_beside(asked: RecipeOptions, recipe: Recipe) -> ResultFiles:
    """Return where results of the recipe as it was asked for go, beside its file."""
    return beside(asked.recipe, load_recipe(asked.recipe), recipe)


def write_lock(locked: Lock, path: Path) -> Path:
    """Write a lock, and return its path."""
    write_text(path, locked.to_json())
    return path


def read_recipe(asked: RecipeOptions) -> Recipe:
    """Return the recipe with the command line's replacements.

    Raises:
        RecipeError: If it is not valid.
    """
    recipe = load_recipe(asked.recipe)
    path = asked.output and str(asked.output.absolute())
    instead = {"path": path, "memory": asked.memory, "device": asked.device}
    if said := {key: value for key, value in instead.items() if value is not None}:
        recipe = updated(recipe, {"output": recipe.to_dict()["output"] | said})
    return recipe


def read_asked(asked: RecipeOptions) -> tuple[Recipe, Lock | None]:
    """Return the recipe with the command line's replacements, and its lock, None where there is none.

    Raises:
        RecipeError: If the recipe is not valid.
        LockError: If the lock cannot be read, or is of another recipe.
    """
    recipe = read_recipe(asked)
    lock = asked.lock_path or lock_beside(asked.recipe)
    if asked.lock_path is None and not lock.is_file():
        return recipe, None
    return recipe, _matching_lock(recipe, lock)


def read_merged(asked: RecipeOptions) -> tuple[Recipe, Lock]:
    """Return the recipe, and the lock that its merged model was made from.

    Raises:
        OutputError: If there is no merged model.
        RecipeError, LockError: As `read_asked`.
    """
    recipe, _ = read_asked(asked)
    path = recipe.output_path / LOCK_NAME
    if not path.is_file():
        raise OutputError(
            "there is no merged model yet",
            where=str(recipe.output_path),
            hint="Run `hub-magmax merge` first.",
        )
    return recipe, _matching_lock(recipe, path)


def _matching_lock(recipe: Recipe, path: Path) -> Lock:
    lock = read_lock(path)
    check_lock(recipe, lock, str(path))
    return lock
