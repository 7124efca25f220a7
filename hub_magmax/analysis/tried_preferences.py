"""Preferences that a comparison tries: the recipe's own, a uniform one, and those that it names."""

from __future__ import annotations

from hub_magmax.analysis.study_journal import say_resumed
from hub_magmax.analysis.tuning import scorer_of
from hub_magmax.errors import KeyPath, RecipeError
from hub_magmax.evaluation.data import with_pinned_data
from hub_magmax.evaluation.journal import Journal
from hub_magmax.preference import resolve_preference
from hub_magmax.recipe.loading import updated
from hub_magmax.recipe.lockfile import COEFFICIENTS, Lock
from hub_magmax.recipe.preferences import Preference
from hub_magmax.recipe.schema import Compare, Recipe
from hub_magmax.text import ProgressBar, Report

#: Names of the recipe's own weights, and of equal ones.
RECIPE, UNIFORM = "recipe", "uniform"


def preferences_to_try(
    recipe: Recipe, spec: Compare, lock: Lock, journal: Journal, report: Report, progress: ProgressBar
) -> dict[str, tuple[float, ...]]:
    """Return the weights of each task by the name of the preference, the recipe's own first.

    Args:
        recipe, lock: What is compared.
        spec: The comparison, whose preferences may be estimated.
        journal: Keeps the models that are scored for an estimate, and has those that were earlier.
        report: Called with a line of text where models are scored for an estimate.
        progress: As `compare` has it.

    Raises:
        RecipeError: If the recipe has coefficients, which are no shares of the tasks.
        EvaluationError: If the data of an estimate cannot be used.
    """
    _check_shares(recipe, lock)
    found = _always(lock)
    if any(preference.is_estimated for preference in spec.preferences.values()):
        say_resumed(journal, report)
    for name, preference in spec.preferences.items():
        asked = with_pinned_data(_under(recipe, preference), lock.datasets)
        scorer = scorer_of(asked, lock, journal, progress, report)
        resolved = resolve_preference(asked, sources=lock.sources, scorer=scorer).weights
        found[name] = tuple(resolved[task] for task in lock.tasks)
    return found


def known_weights(recipe: Recipe, spec: Compare, lock: Lock) -> dict[str, tuple[float, ...]]:
    """Return `preferences_to_try` without an estimate, in place of which numbers unlike all others stand.

    Raises:
        RecipeError: If the recipe has coefficients.
    """
    _check_shares(recipe, lock)
    found = _always(lock)
    for number, (name, preference) in enumerate(spec.preferences.items(), 2):
        if preference.is_estimated:
            found[name] = (float(number),) * len(lock.tasks)
        else:
            resolved = resolve_preference(_under(recipe, preference)).weights
            found[name] = tuple(resolved[task] for task in lock.tasks)
    return found


def _always(lock: Lock) -> dict[str, tuple[float, ...]]:
    return {RECIPE: lock.weights, UNIFORM: (1 / len(lock.tasks),) * len(lock.tasks)}


def _under(recipe: Recipe, preference: Preference) -> Recipe:
    return updated(recipe, {"preference": preference.model_dump(exclude_none=True)})


def _check_shares(recipe: Recipe, lock: Lock) -> None:
    """Raise RecipeError where the recipe has coefficients: most methods need shares of the tasks."""
    rules = (n for n, rule in enumerate(recipe.tensors) if rule.coefficients is not None)
    keys: list[KeyPath] = [("tensors", position, "coefficients") for position in rules]
    keys += [("preference", "coefficients")] if lock.preference.kind == COEFFICIENTS else []
    if keys:
        raise RecipeError(
            "a comparison tries methods that need shares of the tasks",
            key=keys[0],
            hint="Use weights, or leave them out.",
        )
