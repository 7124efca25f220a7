"""Preference by search or greedy choice: the weights whose merged model does best on the labelled sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from hub_magmax.errors import EvaluationError, RecipeError
from hub_magmax.evaluation.data import fingerprint
from hub_magmax.evaluation.margins import normalised_margins
from hub_magmax.files import digest
from hub_magmax.preference.safeguards import bootstrap_shares, conclude, rounded
from hub_magmax.preference.samples import Scorer, split_target
from hub_magmax.recipe.lockfile import ResolvedPreference
from hub_magmax.recipe.preferences import Estimate
from hub_magmax.recipe.schema import Recipe

Weights = Float64[np.ndarray, " tasks"]

#: One number per example, higher is better.
Values = Float64[np.ndarray, " examples"]

#: Merges with weights and scores.
ValuesOf = Callable[[Weights], Values]


@dataclass(frozen=True)
class Tried:
    """Weights that were tried, and the merit of every example."""

    weights: Weights
    values: Values

    @property
    def mean(self) -> float:
        return float(self.values.mean())


@dataclass(frozen=True)
class Choice:
    """The weights that were tried, which of them was chosen, and the log for people."""

    tried: Sequence[Tried]
    chosen: int
    seen: Mapping[str, Any]


def search_weights(values_of: ValuesOf, num_tasks: int, budget: int) -> list[Tried]:
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
        return -known.mean

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

    Raises:
        RecipeError: If the budget does not reach for one try per task.
        EvaluationError: If the data cannot be used, or there is no `scorer`.
    """
    assert recipe.preference is not None
    budget, num_tasks = recipe.preference.spec.budget, len(recipe.tasks)
    if budget <= num_tasks:
        raise RecipeError(
            f"{budget} tries cannot tell {num_tasks} tasks apart",
            where="preference.search.budget",
            expected=f"at least {num_tasks + 1}, better {10 * num_tasks}",
        )

    def look(values_of: ValuesOf) -> Choice:
        tried = search_weights(values_of, num_tasks, budget)
        best = int(np.argmax([attempt.mean for attempt in tried]))
        return Choice(tried, best, rounded({"uniform": tried[0].mean, "best": tried[best].mean}))

    return resolve_by_merging(recipe, look, {"budget": budget}, budget, scorer)


def resolve_by_merging(
    recipe: Recipe,
    look: Callable[[ValuesOf], Choice],
    asked: Mapping[str, Any],
    num_tried: int,
    scorer: Scorer | None,
) -> ResolvedPreference:
    """Return weights that are chosen by merging with several and scoring each on the target sample.

    A bootstrap row is the best of the tried weights on resampled examples.

    Args:
        recipe: Its preference is searched.
        look: Tries weights and chooses.
        asked: Options that decide what is tried, for the digest.
        num_tried: How many weights are tried at most.
        scorer: Merges and scores.

    Raises:
        EvaluationError: If the data cannot be used, or there is no `scorer`.
    """
    assert recipe.preference is not None
    spec: Estimate = recipe.preference.spec
    tasks, where = recipe.task_names, f"preference.{recipe.preference.kind}"
    if scorer is None:
        raise EvaluationError(
            "a search needs models that are merged and scored, which this call does not do",
            where=where,
            hint="Use hub_magmax.lock or the command line.",
        )
    target = split_target(spec, recipe, where, labelled=True)
    score = scorer(target.estimation, spec.target, num_tried)

    def values_of(weights: Weights) -> Values:
        return normalised_margins(score(dict(zip(tasks, weights.tolist(), strict=True))))

    choice = look(values_of)
    shares = bootstrap_shares(len(target.estimation), recipe.seed)
    winners = np.argmax(np.stack([t.values for t in choice.tried]) @ shares.T, axis=0)
    winners[0] = choice.chosen  # The first row is of the examples as they are.
    columns = target.drawn.column_names
    return conclude(
        recipe,
        np.stack([choice.tried[winner].weights for winner in winners]),
        fingerprint=digest({"target": fingerprint(target.drawn, columns), **asked}),
        seen={"examples": len(target.estimation), "tried": len(choice.tried), **choice.seen},
        score=target.score(scorer, spec.target),
    )


def resolve_greedy(recipe: Recipe, *, scorer: Scorer | None) -> ResolvedPreference:
    """Choose tasks on the target sample and return equal weights of them, with the log of decisions.

    Raises:
        EvaluationError: If the data cannot be used, or there is no `scorer`.
    """
    tasks = recipe.task_names
    num_tried = 2 * len(tasks) - 1
    return resolve_by_merging(recipe, lambda values_of: choose(values_of, tasks), {}, num_tried, scorer)


def choose(values_of: ValuesOf, tasks: tuple[str, ...]) -> Choice:
    """Try every task alone, then add them to the best one, in order of merit, where that does no harm.

    2T − 1 models are merged and scored for T tasks. Equally good tasks keep their order. As in the paper a
    task that changes nothing is kept; merit is that of `normalised_margins`, where the paper has accuracy,
    which few examples tell coarsely.

    Returns:
        The last weights that were kept, which none that were tried surpass.

    Source: greedy soup, algorithm 1 of arXiv:2203.05482.
    """
    every = np.eye(len(tasks))
    tried = [Tried(alone, values_of(alone)) for alone in every]
    order = sorted(range(len(tasks)), key=lambda task: -tried[task].mean)
    kept, chosen = [order[0]], order[0]
    together = {tasks[order[0]]: tried[chosen].mean}
    for task in order[1:]:
        members = [*kept, task]
        weights = every[members].sum(axis=0) / len(members)
        tried.append(Tried(weights, values_of(weights)))
        together[tasks[task]] = tried[-1].mean
        if tried[-1].mean >= tried[chosen].mean:
            kept, chosen = members, len(tried) - 1
    alone = {tasks[task]: tried[task].mean for task in order}
    seen = {"alone": rounded(alone), "with_those_before": rounded(together)}
    return Choice(tried, chosen, seen | {"kept": [tasks[task] for task in kept]})
