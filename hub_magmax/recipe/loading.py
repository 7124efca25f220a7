"""Recipes loaded from YAML files and mappings."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import (
    ValidationError,
)

from hub_magmax.errors import HubMagmaxError, KeyPath, Problem, RecipeError
from hub_magmax.recipe.checks import contradictions, option_problems, text_wanted, token_problems
from hub_magmax.recipe.problems import all_problems, explain, in_recipe
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.strict_yaml import Place, read_yaml

#: A recipe is written by hand; anything larger is not one.
MAX_RECIPE_BYTES = 1_000_000


def load_recipe(path: str | Path, *, folder: Path | None = None) -> Recipe:
    """Read and check the recipe in the YAML file `path`.

    Args:
        path: A YAML file.
        folder: Where its relative paths start; the file's own folder by default.

    Raises:
        RecipeError: With every problem found, each at its line and key path.
    """
    path = Path(path)
    values, places, written = read_yaml(_text_of(path), str(path))
    return parse_recipe(
        _with_text(values, written), folder=folder or path.parent, where=str(path), places=places
    )


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"larger than {MAX_RECIPE_BYTES:,} bytes, which no recipe is", where=str(path))
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(
            f"the recipe cannot be read ({reason})", where=str(path), hint="Give the path of a YAML recipe."
        ) from error


def with_place(error: HubMagmaxError, path: Path) -> HubMagmaxError:
    """Return an error about a key with its line in the recipe at `path`, as it is where there is none."""
    with suppress(HubMagmaxError):
        return in_recipe(error, str(path), read_yaml(_text_of(path), str(path)).places)
    return error


def parse_recipe(
    values: Any,
    *,
    folder: Path | None = None,
    where: str = "recipe",
    places: Mapping[KeyPath, Place] | None = None,
) -> Recipe:
    """Check plain values and return the recipe they describe.

    Args:
        values: Plain values of YAML or JSON.
        folder: Where relative paths start; the current folder by default.
        where: Name of the recipe in messages.
        places: Line and column by key path, where known.

    Raises:
        RecipeError: With every problem found.
    """
    if not isinstance(values, dict):
        raise RecipeError("not a mapping of keys to values", where=where, expected="base_model:, tasks:, ...")
    problems: list[Problem] = []
    recipe = None
    folder = (folder or Path()).absolute()
    try:
        recipe = Recipe.model_validate(values, context={"folder": folder})
    except ValidationError as error:
        problems += explain(error, (), Recipe)
        recipe = _without_unknown_keys(values, error)
    problems += option_problems(values)
    problems += token_problems(values, ())
    if recipe is not None:
        recipe._folder = folder
        problems += contradictions(recipe)
    if problems or recipe is None:
        raise all_problems(problems, where, places or {})
    return recipe


def _with_text(values: Any, written: Mapping[KeyPath, str]) -> Any:
    """Return the values with what YAML took for something else as written, wherever text is wanted.

    A task may be called no, 1e3 or 2024. Numbers stay numbers where numbers are wanted.
    """
    wanted = set(text_wanted(values)) & set(written)
    if not wanted:
        return values
    found = copy.deepcopy(values)
    for path in wanted:
        *parents, key = path
        holder = found
        for part in parents:
            holder = holder[part]
        holder[key] = written[path]
    return found


def updated(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a checked copy with top-level keys replaced, e.g. `updated(recipe, {"method": "average"})`."""
    return parse_recipe(recipe.to_dict() | dict(changes), folder=recipe.folder)


def _without_unknown_keys(values: dict[str, Any], error: ValidationError) -> Recipe | None:
    """Return the recipe without its unknown keys, so that what else is wrong is found in the same run."""
    rest = copy.deepcopy(values)
    for entry in error.errors():
        if entry["type"] == "extra_forbidden":
            *parents, key = entry["loc"]
            holder: Any = rest
            for part in parents:
                holder = holder[part]
            del holder[key]
    try:
        return Recipe.model_validate(rest)
    except ValidationError:
        return None


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors."""
    return Recipe.model_json_schema(by_alias=True)
