"""Preferences: from what a recipe says to one weight per task."""

from __future__ import annotations

from hub_magmax.lockfile import ResolvedPreference
from hub_magmax.recipe import Recipe


def resolve_preference(recipe: Recipe) -> ResolvedPreference:
    """Return the weights that the recipe's preference stands for; uniform where it names none.

    Kinds that estimate from data load it here; all others only compute.

    Raises:
        RecipeError: If the weights cannot be formed.
        EvaluationError: If data cannot be loaded.
    """
    from hub_magmax.preference import explicit

    preference, tasks = recipe.preference, recipe.task_names
    if preference is None:
        return explicit.resolved("uniform", tasks, [1.0] * len(tasks))
    if preference.kind == "labels":
        from hub_magmax.preference.labels import resolve_labels

        return resolve_labels(preference.spec, tasks, recipe.folder)
    return explicit.resolved(preference.kind, tasks, explicit.KINDS[preference.kind](preference.spec, tasks))
