"""Preferences written by hand: weights or coefficients by name, and schedules over the order of the tasks.

The paper (arXiv:2605.20803) moves accuracy from the first task to the last by one coefficient
whose formula is not public; the schedules here are ours, and their form is not the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hub_magmax.errors import RecipeError
from hub_magmax.recipe.lockfile import COEFFICIENTS, ResolvedPreference
from hub_magmax.recipe.merge_values import shares
from hub_magmax.recipe.preferences import Power, Schedule


def normalise(masses: Sequence[float]) -> tuple[float, ...]:
    """Return `masses` as shares, as `shares` does.

    Raises:
        RecipeError: If a mass is negative or not finite, or all are zero.
    """
    total = math.fsum(masses)
    if not all(math.isfinite(mass) and mass >= 0 for mass in masses) or not 0 < total < math.inf:
        raise RecipeError(
            f"{', '.join(f'{mass:g}' for mass in masses)} cannot be made into a preference",
            where="preference",
            expected="finite numbers, none below zero and one above",
            hint="With many tasks use a ratio nearer to 1.",
        )
    return shares(masses)


def coefficients(spec: Mapping[str, float], tasks: Sequence[str]) -> ResolvedPreference:
    """Return what each task vector is multiplied by, as written; tasks that are not named get zero."""
    return ResolvedPreference({task: float(spec.get(task, 0.0)) for task in tasks}, COEFFICIENTS)


def weights(spec: Mapping[str, float], tasks: Sequence[str]) -> list[float]:
    """Return each task's weight as written; tasks that are not named get zero."""
    return [float(spec.get(task, 0.0)) for task in tasks]


def geometric(spec: Schedule, tasks: Sequence[str]) -> list[float]:
    """Return w_t ∝ r^(t−1): 1 is uniform, below 1 favours the first tasks."""
    # Relative to the largest, so that no ratio and number of tasks can overflow.
    exponents = [math.log(spec.ratio) * t for t in range(len(tasks))]
    return [math.exp(exponent - max(exponents)) for exponent in exponents]


def linear(spec: Schedule, tasks: Sequence[str]) -> list[float]:
    """Return w_t ∝ 1 + (r−1)(t−1)/(T−1): the last task weighs r times the first."""
    steps = max(len(tasks) - 1, 1)
    return [1 + (spec.ratio - 1) * t / steps for t in range(len(tasks))]


def power(spec: Power, tasks: Sequence[str]) -> list[float]:
    """Return w_t ∝ t^r: 0 is uniform, above 0 favours the last tasks."""
    exponents = [spec.exponent * math.log(t) for t in range(1, len(tasks) + 1)]
    return [math.exp(exponent - max(exponents)) for exponent in exponents]


KINDS: Mapping[str, Callable[[Any, Sequence[str]], list[float]]] = {
    "weights": weights,
    "geometric": geometric,
    "linear": linear,
    "power": power,
}


def resolved(kind: str, tasks: Sequence[str], masses: Sequence[float]) -> ResolvedPreference:
    """Return the masses as a preference over `tasks`."""
    if not tasks:  # of a stack of one model's layers
        return ResolvedPreference({}, kind)
    return ResolvedPreference(dict(zip(tasks, normalise(masses), strict=True)), kind)
