"""Verbs for recipes: validate, prefer, schema."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hub_magmax.cli.options import RecipeOptions, changed_recipe, from_cache_option
from hub_magmax.cli.terminal import Answer, progress, say, verb
from hub_magmax.text import number_of

if TYPE_CHECKING:
    from hub_magmax.recipe.lockfile import ResolvedPreference
    from hub_magmax.recipe.schema import Recipe


@verb
@changed_recipe
def validate(asked: RecipeOptions) -> Answer:
    """Check RECIPE without looking at any checkpoint or data.

    \b
    Example:
      hub-magmax validate recipe.yaml
    """
    from hub_magmax.recipe.loading import parse_text

    found, name = parse_text(asked.text, asked.changes), asked.text.name
    missing = [place for place, model in _models(found).items() if _is_missing(model, found)]
    facts = {"recipe": name, "digest": found.digest, "tasks": list(found.task_names), "not_here": missing}
    sites = f", {number_of(len(found.sites), 'site')}" if found.sites else ""
    lines = [f"{name}: valid, {number_of(len(found.tasks), 'task')}, {found.method.name}{sites}"]
    lines += [f"note: {place}: there is no {_models(found)[place]} on this machine" for place in missing]
    if missing and found.training is not None:
        lines.append("`hub-magmax finetune` makes the checkpoints of the tasks that have training data")
    lines.append("checkpoints were not opened: `hub-magmax plan` reads their headers")
    if found.evaluation is not None or found.compare is not None or found.is_measured:
        lines.append(
            "data was not looked at: `plan` reads the columns of local files of the evaluation, "
            "`run --dry-run` its examples"
        )
    return Answer(facts, "\n".join(lines))


def _models(recipe: Recipe) -> dict[str, str]:
    """Return the names of the models by their keys, which have the number of a task, as errors have it."""
    return {".".join(map(str, key)): model for key, model in recipe.models.items()}


def _is_missing(model: str, recipe: Recipe) -> bool:
    """Say whether a model is named by a path, and nothing is there."""
    from hub_magmax.recipe.model_names import expanded, is_there

    return model.startswith((".", "/", "~")) and not is_there(recipe.folder / expanded(model))


@verb
def schema() -> Answer:
    """Print the JSON schema of recipes, for editors.

    \b
    Example:
      hub-magmax schema
    """
    from hub_magmax.recipe.loading import json_schema

    found = json_schema()
    return Answer(found, json.dumps(found, indent=2))


@verb
@changed_recipe
@from_cache_option
def prefer(asked: RecipeOptions) -> Answer:
    """Show the preference that RECIPE resolves to.

    An estimate is kept in the lock beside it.

    \b
    Example:
      hub-magmax prefer recipe.yaml
    """
    from dataclasses import asdict

    from hub_magmax.cli.recipe_and_lock import read_recipe
    from hub_magmax.preference import resolve_preference

    recipe = read_recipe(asked)
    estimated = recipe.preference is not None and recipe.preference.is_estimated
    found, wrote = _estimated(asked, recipe) if estimated else (resolve_preference(recipe), [])
    width = max((len(name) for name in found.weights), default=0)
    bars = [f"{n:<{width}}  {w:6.3f}  {'█' * round(40 * w)}" for n, w in found.weights.items()]
    notes = [
        f"{_NOTES.get(key, key.replace('_', ' '))}: {_plainly(fact)}"
        for key, fact in found.explanation.items()
    ]
    return Answer(asdict(found), "\n".join([f"kind: {found.kind}", *bars, *notes, *wrote]))


def _estimated(asked: RecipeOptions, recipe: Recipe) -> tuple[ResolvedPreference, list[str]]:
    """Return an estimate, and what was written: its lock, unless the command line changed the recipe."""
    from hub_magmax.cli.recipe_and_lock import (
        check_lock_path,
        earlier_lock,
        lock_beside,
        lock_journal,
        write_lock,
    )
    from hub_magmax.pipeline import lock

    path = None if asked.changes else lock_beside(asked)
    if path is not None:
        check_lock_path(path)
    journal = lock_journal(asked, recipe)
    locked = lock(recipe, report=say, progress=progress, earlier=earlier_lock(asked), journal=journal)
    return locked.preference, [] if path is None else [f"wrote {write_lock(locked, path)}"]


#: Facts of an estimate that need more words than their names.
_NOTES = {
    "distances": "distances (of the target to each task's data alone)",
    "similarities": "similarities (of the target to each task's data; exp(-distance / temperature))",
    "farther_than_mixture": "farther than the mixture (each task's data alone from the target, by what the"
    " weights minimise: the Sinkhorn divergence for transport, the squared discrepancy for mmd)",
}


def _plainly(value: Any) -> str:
    """Return a number, or numbers by name, as a person would write them."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plainly(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return (", " if isinstance(value[0], str) else " to ").join(_plainly(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
