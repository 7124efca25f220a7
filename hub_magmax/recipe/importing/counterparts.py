"""Methods of recipes that compute what methods of mergekit do, with their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from hub_magmax.recipe.importing.findings import Verdict
from hub_magmax.recipe.importing.parameters import Value, constant, constant_sum, is_exact_factor
from hub_magmax.recipe.importing.readings import LostError, Readings

T = TypeVar("T")

#: Sums that differ from 1 by less are 1.
_SAME_SUM = 1e-9

#: Where nothing is scaled.
ONE, ZERO = constant(1.0), constant(0.0)

#: Below this a sum of weights counts as 0, and mergekit divides by 1.
_ZERO = 1e-8


@dataclass(frozen=True)
class Counterpart:
    """How a recipe merges the tensors of a case.

    Attributes:
        method: Name of the method.
        numbers: By task.
        kind: `weights`, relative to their sum, or `coefficients`.
        options: Of the method; a `Value`, numbers by task, or a plain value each.
        scaling: The scaling coefficient.
        take: In place of all that, the source that the tensors are copied from.
        factor: What copies are multiplied by.
        verdict: On the method as a whole.
        why: What it does.
        neutral: Parameters that change nothing.
        counts_base: Whether the base model is a task too.
    """

    method: str
    numbers: Mapping[str, Value] = field(default_factory=dict)
    kind: str = "weights"
    options: Mapping[str, Any] = field(default_factory=dict)
    scaling: Value = ONE
    take: str | None = None
    factor: Value = ONE
    verdict: Verdict = field(default="rounding", compare=False)
    why: str = field(default="", compare=False)
    neutral: tuple[str, ...] = field(default=(), compare=False)
    counts_base: bool = False


#: Makes the counterparts of all cases.
Maker = Callable[[Sequence[Readings]], list[Counterpart]]


def counterparts_of(every: Sequence[Readings]) -> list[Counterpart] | None:
    """Return how each case is merged, all by one method; None, noted, where nothing computes the same."""
    first = every[0]
    maker = _MAKERS.get(first.method)
    try:
        if maker is None:
            raise first.lost(f"there is no method here that computes what {first.method} does")
        found = maker(every)
    except LostError:
        return None
    for one in found:
        first.notes.add(first.configuration.method_at, one.verdict, one.why)
    return found


def _one_by_one(make: Callable[[Readings], T]) -> Callable[[Sequence[Readings]], list[T]]:
    """Return what makes something of every case; whatever is lost is noted, and raised after all of them."""

    def make_all(every: Sequence[Readings]) -> list[T]:
        found, lost = [], None
        for read in every:
            try:
                found.append(make(read))
            except LostError as error:
                lost = error
        if lost is not None:
            raise lost
        return found

    return make_all


# Means and sums.


def _linear(every: Sequence[Readings]) -> list[Counterpart]:
    """Return a mean with shares, a sum with coefficients, or a mean of which the base model is a task too.

    The first form is what people write. Coefficients may have any sign, and may run over the blocks where the
    weights sum to the same in all of them.
    """
    totals = _one_by_one(_total)(every)
    if None in totals:
        return _one_by_one(_relative_mean)(every)
    found = [_sum_of(read, total or 1.0) for read, total in zip(every, totals, strict=True)]
    shares = [_mean_of(one) for one in found]
    return [one for one in shares if one is not None] if None not in shares else found


def _total(read: Readings) -> float | None:
    """Return what the weights of `linear` are divided by; None where it differs between blocks."""
    total, normalize = constant_sum([*read.each("weight").values()]), read.switch("normalize")
    if not normalize and (total is None or not _is_one(total)):
        told = "differ between blocks" if total is None else f"sum to {total:g}"
        raise read.lost(f"weights that {told} scale the base model too", read.place_of("normalize"))
    if total is not None and abs(total) < _ZERO:
        raise read.lost("weights that sum to 0, where mergekit writes NaN")
    return total


def _is_one(total: float) -> bool:
    return abs(total - 1) <= _SAME_SUM


def _sum_of(read: Readings, total: float) -> Counterpart:
    numbers = _by_task(read, read.each("weight"), total)
    why = "the weighted mean of the models, as a sum of task vectors"
    neutral = ("normalize",) if _is_one(total) else ()
    return Counterpart("task_arithmetic", numbers, "coefficients", why=why, neutral=neutral)


def _mean_of(found: Counterpart) -> Counterpart | None:
    """Return a sum as a mean of the tasks; None where one is subtracted, or differs between blocks."""
    shares = shares_of(found.numbers)
    if shares is None or not all(value.is_constant for value in found.numbers.values()):
        return None
    numbers = {task: constant(share) for task, share in shares[0].items()}
    why = "the weighted mean of the models"
    return Counterpart("average", numbers, scaling=constant(shares[1]), why=why, neutral=found.neutral)


def _relative_mean(read: Readings) -> Counterpart:
    read = replace(read, family=read.family.with_base_as_task())
    weights = read.each("weight")
    if min(point for value in weights.values() for point in value.points) < 0:
        raise read.lost("weights below 0 whose sum differs between blocks", *read.places_of_each("weight"))
    why = "the weighted mean of the models, divided by the sum of the weights in every block"
    return Counterpart("average", _by_task(read, weights), why=why, counts_base=True)


def _by_task(read: Readings, weights: Mapping[int, Value], divisor: float = 1.0) -> dict[str, Value]:
    """Return the number of every task."""
    found = dict.fromkeys(read.family.tasks, constant(0.0))
    for number, weight in weights.items():
        for task in read.tasks_of(number):
            found[task] = _plus(read, found[task], weight.times(1 / divisor))
    return found


def _plus(read: Readings, one: Value, other: Value) -> Value:
    """Return the sum of two values of the same points."""
    if len(one.points) not in (1, len(other.points)) and len(other.points) != 1:
        raise read.lost("the same adapter twice, with gradients of different lengths")
    most = max(len(one.points), len(other.points))
    shares = [n / (most - 1) if most > 1 else 0.0 for n in range(most)]
    return Value(tuple(one.at(share) + other.at(share) for share in shares))


def _summed(read: Readings) -> Counterpart:
    weights, normalize, scaling = read.each("weight"), read.switch("normalize"), read.shared("lambda")
    _check_rescaling(read)
    total = constant_sum([*weights.values()])
    options = _options(read)
    is_mean = normalize and (total is None or abs(total) >= _ZERO)
    if is_mean and total is None:
        raise read.lost("weights whose sum differs between blocks", read.place_of("normalize"))
    numbers = _by_task(read, weights, total if is_mean and total else 1.0)
    name = {"dare_linear": "dare"}.get(read.method, read.method)
    why = "a mean of task vectors" if is_mean else "a sum of task vectors"
    verdict: Verdict = "rounding"
    if name == "dare":
        why += "; mergekit scales what is left to the L1 norm that was there, here by 1/density"
        verdict = "in expectation"
    return Counterpart(name, numbers, "coefficients", options, scaling, verdict=verdict, why=why)


# Elections.


def _elected(read: Readings) -> Counterpart:
    weights, normalize, scaling = read.each("weight"), read.switch("normalize"), read.shared("lambda")
    _check_rescaling(read)
    numbers, options = _by_task(read, weights), _options(read)
    verdict: Verdict = "in expectation" if read.method == "dare_ties" else "rounding"
    if not normalize:
        options["consensus"] = "sum"
        why = "the sum of the tasks that agree in sign"
        why += "" if read.is_written("normalize") else f": {read.method} sums where normalize is left out"
        return Counterpart(read.method, numbers, "coefficients", options, scaling, verdict=verdict, why=why)
    points = [point for value in numbers.values() for point in value.points]
    if min(points, default=0) < 0:
        raise read.lost("a mean with weights below 0", *read.places_of_each("weight"))
    if not any(points):
        raise read.lost("a mean with weights of 0 alone")
    why = "the mean of the tasks that agree in sign"
    return Counterpart(read.method, numbers, "weights", options, scaling, verdict=verdict, why=why)


def _check_rescaling(read: Readings) -> None:
    """Raise where `rescale` is not what the method here does; only what was dropped is scaled up."""
    default = read.configuration.method.shared["rescale"]
    if read.reads("density") and read.switch("rescale") is not default:
        raise read.lost(f"{read.method} here always does, or never does", read.place_of("rescale"))


def _options(read: Readings) -> dict[str, Any]:
    """Return density and outliers, of each task its own where they differ, and how they are counted."""
    if not read.reads("density"):
        return {}
    densities = _densities(read)
    found: dict[str, Any] = {"density": _common(densities)}
    if read.reads("gamma"):
        gammas = dict.fromkeys(read.family.tasks, ZERO) | read.each_by_task("gamma")
        outliers = {task: _outliers(read, gamma, densities[task]) for task, gamma in gammas.items()}
        found["outliers"] = _common(outliers)
    if not read.configuration.method.is_random and found["density"] != ONE:
        found["rounding"] = "down"
    return found


def _densities(read: Readings) -> dict[str, Value]:
    """Return the density of every task; 1 of those that are not in this part."""
    found = dict.fromkeys(read.family.tasks, ONE) | read.each_by_task("density")
    if min(point for value in found.values() for point in value.points) <= 0:
        raise read.lost("a density is above 0: nothing would be left", *read.places_of_each("density"))
    return {task: Value(tuple(min(p, 1.0) for p in value.points)).simplest for task, value in found.items()}


def _outliers(read: Readings, gamma: Value, density: Value) -> Value:
    """Return gamma; none where all is kept, and then mergekit drops no outliers either."""
    if density == ONE:
        return ZERO
    if max(gamma.points) + max(density.points) <= 1 and min(gamma.points) >= 0:
        return gamma
    why = "gamma is from 0 to what density leaves; beyond that mergekit shortens it, by numbers of elements"
    raise read.lost(why, *read.places_of_each("gamma"))


def _common(values: Mapping[str, Value]) -> Value | dict[str, Value]:
    """Return the one value that all tasks have, or else a value for each."""
    different = set(values.values())
    return different.pop() if len(different) == 1 else dict(values)


# Copies.


def _copied(read: Readings) -> Counterpart:
    if len(read.region.part.inputs) != 1:
        raise read.lost("passthrough takes one model, also in mergekit", read.region.part.at)
    factor = read.each("scale")[0] if read.case.picked[0, "scale"].value else ONE
    tasks = read.tasks_of(0)
    if tasks and read.family.tasks[tasks[0]] == read.region.part.inputs[0].reference.lora:
        if factor != ONE:
            raise read.lost("a model with an adapter times a factor", *read.places_of_each("scale"))
        return Counterpart("average", {tasks[0]: ONE}, why="the adapter added to its model")
    take, why = tasks[0] if tasks else "base_model", "copies, bit for bit"
    if not all(map(is_exact_factor, factor.points)):
        return Counterpart("single_task", take=take, factor=factor, why="copies, times a factor")
    return Counterpart("single_task", take=take, factor=factor, verdict="exact", why=why)


_MAKERS: Mapping[str, Maker] = {
    "linear": _linear,
    "task_arithmetic": _one_by_one(_summed),
    "dare_linear": _one_by_one(_summed),
    "breadcrumbs": _one_by_one(_summed),
    "ties": _one_by_one(_elected),
    "dare_ties": _one_by_one(_elected),
    "passthrough": _one_by_one(_copied),
}


def short(value: float) -> float:
    """Return a number as a person would write it, where nothing is lost that counts."""
    return float(f"{value:.12g}")


def shares_of(numbers: Mapping[str, Value]) -> tuple[dict[str, float], float] | None:
    """Return the shares of tasks outside of the blocks, and their sum; None where they are no shares."""
    first = {task: value.first for task, value in numbers.items()}
    total = math.fsum(first.values())
    if total <= 0 or min(first.values()) < 0:
        return None
    return {task: number / total for task, number in first.items()}, total
