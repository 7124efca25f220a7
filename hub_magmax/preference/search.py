"""Preference by search: the weights whose merged model does best on the labelled target sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from hub_magmax.errors import EvaluationError, RecipeError
from hub_magmax.evaluation.data import fingerprint
from hub_magmax.evaluation.margins import normalised_margins
from hub_magmax.files import digest
from hub_magmax.preference.safeguards import bootstrap_shares, conclude, rounded
from hub_magmax.preference.samples import Scorer, split_target
from hub_magmax.recipe.lockfile import ResolvedPreference
from hub_magmax.recipe.preferences import Search
from hub_magmax.recipe.schema import Recipe

Weights = Float64[np.ndarray, " tasks"]


@dataclass(frozen=True)
class Tried:
    """Weights that were tried, and the merit of every example."""

    weights: Weights
    values: Float64[np.ndarray, " examples"]


def search_weights(
    values_of: Callable[[Weights], Float64[np.ndarray, " examples"]], num_tasks: int, budget: int
) -> list[Tried]:
    """Try weights until the budget is spent or nothing improves, and return all of them in order.

    Uniform weights come first, then a simplex with one corner halfway towards each task, from which
    Nelder and Mead's method goes on. A point outside the weights' simplex stands for the nearest
    weights that its positive part gives, so a task can end with none.

    Args:
        values_of: Returns one number per example, the same examples each time; higher is better.
        num_tasks: At least 1.
        budget: How many weights are tried at most, more than `num_tasks`.
    """
    from scipy.optimize import minimize

    tried: list[Tried] = []

    def loss(free: Float64[np.ndarray, " free"]) -> float:
        weights = on_simplex(np.append(free, 1 - free.sum()))
        known = next((t for t in tried if np.array_equal(t.weights, weights)), None)
        if known is None:
            known = Tried(weights, values_of(weights))
            tried.append(known)
        return -float(known.values.mean())

    uniform = np.full(num_tasks, 1 / num_tasks)
    loss(uniform[:-1])
    if num_tasks > 1:
        corners = (uniform + np.eye(num_tasks)) / 2
        minimize(
            loss,
            corners[0, :-1],
            method="Nelder-Mead",
            # The first evaluation is of a corner that the simplex evaluates again.
            options={"initial_simplex": corners[:, :-1], "maxfev": budget - 1, "xatol": 0.01, "fatol": 1e-4},
        )
    return tried


def on_simplex(point: Weights) -> Weights:
    """Return the positive part divided by its sum; uniform weights where there is none."""
    positive = np.maximum(point, 0.0)
    total = math.fsum(positive)
    return positive / total if total > 0 else np.full(len(point), 1 / len(point))


def resolve_search(recipe: Recipe, *, scorer: Scorer | None) -> ResolvedPreference:
    """Search on the target sample and return the weights with what was seen.

    A bootstrap row is the best of the tried weights on resampled examples.

    Raises:
        RecipeError: If the budget does not reach for one try per task.
        EvaluationError: If the data cannot be used, or there is no `scorer`.
    """
    assert recipe.preference is not None
    spec: Search = recipe.preference.spec
    tasks = recipe.task_names
    if spec.budget <= len(tasks):
        raise RecipeError(
            f"{spec.budget} tries cannot tell {len(tasks)} tasks apart",
            where="preference.search.budget",
            expected=f"at least {len(tasks) + 1}, better {10 * len(tasks)}",
        )
    if scorer is None:
        raise EvaluationError(
            "a search needs models that are merged and scored, which this call does not do",
            where="preference.search",
            hint="Use hub_magmax.lock or the command line.",
        )
    target = split_target(spec, recipe, "preference.search", labelled=True)
    score = scorer(target.estimation, spec.target)

    def values_of(weights: Weights) -> Float64[np.ndarray, " examples"]:
        return normalised_margins(score(dict(zip(tasks, weights.tolist(), strict=True))))

    tried = search_weights(values_of, len(tasks), spec.budget)
    shares = bootstrap_shares(len(target.estimation), recipe.seed)
    winners = np.argmax(np.stack([t.values for t in tried]) @ shares.T, axis=0)
    columns = target.drawn.column_names
    return conclude(
        recipe,
        np.stack([tried[winner].weights for winner in winners]),
        fingerprint=digest({"target": fingerprint(target.drawn, columns), "budget": spec.budget}),
        seen={"examples": len(target.estimation), "tried": len(tried)}
        | rounded({"uniform": float(tried[0].values.mean()), "best": float(tried[winners[0]].values.mean())}),
        score=target.score(scorer, spec.target),
    )
