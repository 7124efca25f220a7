"""Verbs for recipes alone: validate, schema."""

from __future__ import annotations

import json
from pathlib import Path

from hub_magmax.terminal import Answer, recipe_argument, verb


@verb
@recipe_argument
def validate(recipe: Path) -> Answer:
    """Check RECIPE without looking at any checkpoint."""
    from hub_magmax.recipe.loading import load_recipe

    found = load_recipe(recipe)
    facts = {"recipe": str(recipe), "digest": found.digest, "tasks": list(found.task_names)}
    return Answer(facts, f"{recipe}: valid, {len(found.tasks)} tasks, {found.method.name}")


@verb
def schema() -> Answer:
    """Print the JSON schema of recipes, for editors."""
    from hub_magmax.recipe.loading import json_schema

    found = json_schema()
    return Answer(found, json.dumps(found, indent=2))
