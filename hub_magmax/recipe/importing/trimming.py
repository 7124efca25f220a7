"""Counterparts of methods that trim task vectors, or drop elements of them at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from hub_magmax.recipe.importing.counterparts import (
    ONE,
    ZERO,
    Counterpart,
    by_task,
    is_divided,
    over_sum,
    shares,
)
from hub_magmax.recipe.importing.findings import Verdict
from hub_magmax.recipe.importing.parameters import Value, constant_sum, sums_of
from hub_magmax.recipe.importing.readings import Readings

#: Names of methods that are called otherwise here.
_NAMES = {"dare_linear": "dare"}

#: Methods that rank what they drop, and may scale what is left to the sum of magnitudes that was there.
_RANKED = ("della", "della_linear")

#: Methods beside these that do so.
_RESCALED = ("ties", "breadcrumbs")


def summed(read: Readings) -> Counterpart:
    """Return a sum of what is left of the task vectors."""
    weights, scaling, options = read.each("weight"), read.shared("lambda"), _options(read)
    total = constant_sum([*weights.values()])
    is_mean = is_divided(read, total)
    counted = _without_emptied(read, weights)
    why = f"a {'mean' if is_mean else 'sum'} of what is left of the task vectors"
    if is_mean and total is None:
        return _divided(read, counted, _made(read, {}, "coefficients", options, scaling, why))
    numbers = _unscaled(read, by_task(read, counted, total if is_mean and total else 1.0))
    return _made(read, numbers, "coefficients", options, scaling, why)


def _divided(read: Readings, weights: Mapping[int, Value], found: Counterpart) -> Counterpart:
    """Return the same with coefficients of every block: its weights, divided by their sum."""
    if weights != read.each("weight") or (read.method.startswith("dare") and not read.switch("rescale")):
        raise read.lost("weights whose sum differs between blocks", read.place_of("normalize"))
    numbers_at = over_sum(read, weights)
    return replace(found, numbers=numbers_at(0.0), numbers_at=numbers_at)


def elected(read: Readings) -> Counterpart:
    """Return the mean, or the sum, of the tasks that agree with the sign that they elect."""
    weights = _without_emptied(read, read.each("weight"))
    scaling, options = read.shared("lambda"), _options(read)
    if read.switch("normalize"):
        why = "the mean of the tasks that agree in sign"
        if not any(point for value in weights.values() for point in value.points):
            weights, scaling = dict.fromkeys(weights, ONE), ZERO  # mergekit divides by 1: nothing is added
        numbers = shares(read, weights)
        if read.method == "dare_ties" and not read.switch("rescale"):
            raise read.lost("dare_ties here scales what is left up", read.place_of("rescale"))
        return _made(read, numbers, "weights", options | {"consensus": "mean"}, scaling, why)
    why = "the sum of the tasks that agree in sign"
    why += "" if read.is_written("normalize") else f": {read.method} sums where normalize is left out"
    numbers = _unscaled(read, by_task(read, weights))
    return _made(read, numbers, "coefficients", options | {"consensus": "sum"}, scaling, why)


def _without_emptied(read: Readings, weights: Mapping[int, Value]) -> dict[int, Value]:
    """Return weights with 0 for models of density 0, of which nothing is left to agree or to be added."""
    densities = read.each("density")
    return {number: ZERO if densities[number] == ZERO else weight for number, weight in weights.items()}


def _made(
    read: Readings,
    numbers: Mapping[str, Value],
    kind: str,
    options: Mapping[str, Any],
    scaling: Value,
    why: str,
) -> Counterpart:
    verdict: Verdict = "in expectation" if read.configuration.method.is_random else "rounding"
    if read.method.startswith("dare"):
        why += "; mergekit scales what is left to the sum of magnitudes that was there, here by 1/density"
    name = _NAMES.get(read.method, read.method)
    return Counterpart(name, numbers, kind, options, scaling, verdict=verdict, why=why)


def _unscaled(read: Readings, numbers: dict[str, Value]) -> dict[str, Value]:
    """Return the numbers where what is left is not scaled up: the methods here do that by 1/density."""
    if not read.method.startswith("dare") or read.switch("rescale"):
        return numbers
    densities = _densities(read)
    if not all(value.is_constant for value in densities.values()):
        raise read.lost("a density that differs between blocks, and no rescale", read.place_of("rescale"))
    return {task: value.times(densities[task].first) for task, value in numbers.items()}


def _options(read: Readings) -> dict[str, Any]:
    """Return density, outliers and the like, of each task its own where they differ."""
    densities = _densities(read)
    found: dict[str, Any] = {"density": _common(densities)}
    if read.reads("gamma"):
        gammas = dict.fromkeys(read.family.tasks, ZERO) | read.each_by_task("gamma")
        found["outliers"] = _common({task: _outliers(read, g, densities[task]) for task, g in gammas.items()})
    if read.method in _RANKED:
        return found | _ranked_options(read, densities)
    if not read.method.startswith("dare") and found["density"] != ONE:
        found |= {"rounding": "down", **_rescaling(read)}
    return found


def _rescaling(read: Readings) -> dict[str, str]:
    """Return whether what is left is scaled up; nothing where no line of the configuration says so."""
    is_rescaled = read.switch("rescale")
    if is_rescaled and read.method not in _RESCALED:
        raise read.lost(f"{read.method} here does not scale what is left up", read.place_of("rescale"))
    levels = chain.from_iterable(part.levels for part in read.configuration.slices)
    is_written = read.method in _RESCALED and any("rescale" in level for level in levels)
    return {"rescale": "norm" if is_rescaled else "none"} if is_written else {}


def _ranked_options(read: Readings, densities: Mapping[str, Value]) -> dict[str, Any]:
    epsilons = dict.fromkeys(read.family.tasks, ZERO) | read.each_by_task("epsilon")
    for task, density in densities.items():
        _check_epsilon(read, density, epsilons[task])
    return {"epsilon": _common(epsilons), "rescale": "norm" if read.switch("rescale") else "none"}


def _check_epsilon(read: Readings, density: Value, epsilon: Value) -> None:
    """Raise where probabilities would leave the range between 0 and 1, which mergekit refuses."""
    if density == ONE:
        return
    lows, highs = sums_of((density, epsilon.times(-1))), sums_of((density, epsilon))
    if min(epsilon.points) < 0 or min(lows) <= 0 or max(highs) >= 1:
        why = "density - epsilon is above 0, and density + epsilon below 1, also in mergekit"
        raise read.lost(why, *(read.places_of_each("epsilon") or read.places_of_each("density")))


def _densities(read: Readings) -> dict[str, Value]:
    """Return the density of every task; 1 of those that are not in this part, or count nothing."""
    found = dict.fromkeys(read.family.tasks, ONE) | read.each_by_task("density")
    found = {task: ONE if value == ZERO else value for task, value in found.items()}
    if min((point for value in found.values() for point in value.points), default=1) <= 0:
        raise read.lost("a density that is 0 in some blocks, or below 0", *read.places_of_each("density"))
    return {task: Value(tuple(min(p, 1.0) for p in value.points)).simplest for task, value in found.items()}


def _outliers(read: Readings, gamma: Value, density: Value) -> Value:
    """Return gamma; none where all is kept, and then mergekit drops no outliers either."""
    if density == ONE:
        return ZERO
    if max(sums_of((gamma, density))) <= 1 and min(gamma.points) >= 0:
        return gamma
    why = "gamma is from 0 to what density leaves; beyond that mergekit shortens it, by numbers of elements"
    raise read.lost(why, *read.places_of_each("gamma"))


def _common(values: Mapping[str, Value]) -> Value | dict[str, Value]:
    """Return the one value that all tasks have, or else a value for each."""
    different = set(values.values())
    return different.pop() if len(different) == 1 else dict(values)
