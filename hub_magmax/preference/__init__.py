"""Preferences: one weight per task, from weights, schedules, labels, distances, search or greedy choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hub_magmax.recipe.lockfile import LockedSource, ResolvedPreference
from hub_magmax.recipe.schema import Recipe
from hub_magmax.text import step

if TYPE_CHECKING:
    from hub_magmax.preference.samples import Scorer


@step("resolving the preference")
def resolve_preference(
    recipe: Recipe,
    *,
    sources: Mapping[str, LockedSource] | None = None,
    scorer: Scorer | None = None,
) -> ResolvedPreference:
    """Return the weights that the recipe's preference stands for; uniform where it names none.

    Kinds that estimate from data load it here, and models where they need features; all others only
    compute.

    Args:
        recipe: What to resolve.
        sources: The pinned checkpoints by name; without them, revisions are what the recipe says.
        scorer: Called with the held-out examples, their `Data` and the most weights that are tried, returns a
            function that merges with given weights and returns one outcome per held-out example.

    Raises:
        RecipeError: If the weights cannot be formed.
        EvaluationError: If data or models cannot be used, a sample is too small to say anything, or
            the recipe asks for a hold-out and there is no scorer.
    """
    from hub_magmax.preference import explicit

    preference, tasks = recipe.preference, recipe.task_names
    if preference is None:
        return explicit.resolved("uniform", tasks, [1.0] * len(tasks))
    if preference.coefficients is not None:
        return explicit.coefficients(preference.coefficients, tasks)
    if not preference.is_estimated:
        masses = explicit.KINDS[preference.kind](preference.spec, tasks)
        return explicit.resolved(preference.kind, tasks, masses)
    if preference.kind == "labels":
        from hub_magmax.preference.labels import resolve_labels

        return resolve_labels(recipe, scorer=scorer)
    if preference.is_searched:
        from hub_magmax.preference.search import resolve_greedy, resolve_search

        resolve = resolve_greedy if preference.greedy else resolve_search
        return resolve(recipe, scorer=scorer)
    from hub_magmax.preference.comparison import resolve_comparison

    return resolve_comparison(recipe, sources=sources, scorer=scorer)
