"""Counterparts of `linear`, `task_arithmetic` and `passthrough`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

from hub_magmax.recipe.importing.counterparts import (
    ONE,
    SUM_OF_ZERO,
    ZERO,
    Counterpart,
    by_task,
    is_divided,
    one_by_one,
    over_sum,
    plus,
    shares,
    shares_of,
)
from hub_magmax.recipe.importing.parameters import Value, constant, constant_sum, is_exact_factor
from hub_magmax.recipe.importing.readings import Readings

#: Sums that differ from 1 by less are 1.
_SAME_SUM = 1e-9


def linear(every: Sequence[Readings]) -> list[Counterpart]:
    """Return a mean with shares, a sum with coefficients, or a mean of which the base model is a task too.

    The first form is what people write. Coefficients may have any sign, and may run over the blocks where the
    weights sum to the same in all of them. Where they are not divided by their sum, it is the sum of whole
    models.
    """
    totals = one_by_one(_total)(every)
    if not all(_sums_to_one(read, total) for read, total in zip(every, totals, strict=True)):
        return one_by_one(_weighted_sum)(every)
    if None in totals:
        return one_by_one(_signed_mean if any(map(_subtracts, every)) else _relative_mean)(every)
    return _constant_means(every, [total or 1.0 for total in totals])


def _constant_means(every: Sequence[Readings], totals: Sequence[float]) -> list[Counterpart]:
    """Return means by weights that sum to the same in all blocks of a case."""
    if not every[0].family.tasks:
        return [Counterpart("single_task", take="base_model", why="one model alone, copied") for _ in every]
    found = [_sum_of(read, total) for read, total in zip(every, totals, strict=True)]
    means = [_mean_of(one) for one in found]
    return [one for one in means if one is not None] if None not in means else found


def _total(read: Readings) -> float | None:
    """Return what the weights sum to; None where that differs between blocks."""
    total = constant_sum([*read.each("weight").values()])
    if total is not None and abs(total) < SUM_OF_ZERO and read.switch("normalize"):
        raise read.lost("weights that sum to 0, where mergekit writes NaN")
    return total


def _sums_to_one(read: Readings, total: float | None) -> bool:
    """Say whether the weights of a case count as they are, or are divided by their sum."""
    return read.switch("normalize") or (total is not None and _is_one(total))


def _is_one(total: float) -> bool:
    return abs(total - 1) <= _SAME_SUM


def _sum_of(read: Readings, total: float) -> Counterpart:
    numbers = by_task(read, read.each("weight"), total)
    why = "the weighted mean of the models, as a sum of task vectors"
    neutral = ("normalize",) if _is_one(total) else ()
    return Counterpart("task_arithmetic", numbers, "coefficients", why=why, neutral=neutral)


def _mean_of(found: Counterpart) -> Counterpart | None:
    """Return a sum as a mean of the tasks; None where one is subtracted, or differs between blocks."""
    parts = shares_of(found.numbers)
    if parts is None or not all(value.is_constant for value in found.numbers.values()):
        return None
    numbers = {task: constant(share) for task, share in parts[0].items()}
    why = "the weighted mean of the models"
    return Counterpart("average", numbers, scaling=constant(parts[1]), why=why, neutral=found.neutral)


def _subtracts(read: Readings) -> bool:
    """Say whether a weight is below 0."""
    return any(point < 0 for value in read.each("weight").values() for point in value.points)


def _signed_mean(read: Readings) -> Counterpart:
    """Return a sum with the coefficients of every block: its weights, divided by their sum."""
    numbers_at = over_sum(read, read.each("weight"))
    why = "the weighted mean of the models, as a sum of task vectors with coefficients of each block"
    return Counterpart("task_arithmetic", numbers_at(0.0), "coefficients", why=why, numbers_at=numbers_at)


def _relative_mean(read: Readings) -> Counterpart:
    numbers = shares(read.with_base, read.each("weight"))
    why = "the weighted mean of the models, divided by the sum of the weights in every block"
    return Counterpart("average", numbers, why=why, counts_base=True)


def _weighted_sum(read: Readings) -> Counterpart:
    """Return the sum of whole models; also of a case in which the weights are divided by their sum."""
    read, weights = read.with_base, read.each("weight")
    numbers = shares(read, weights)
    total = ONE if read.switch("normalize") else reduce(lambda a, b: plus(read, a, b), weights.values(), ZERO)
    why = "the weighted sum of whole models: weights that do not sum to 1 scale all of them"
    return Counterpart("weighted_sum", numbers, options={"total": total}, why=why, counts_base=True)


def task_arithmetic(every: Sequence[Readings]) -> list[Counterpart]:
    """Return a sum of task vectors, or a mean where the weights are divided by sums that differ."""
    if not any(one_by_one(_is_relative)(every)):
        return one_by_one(_added)(every)
    if any(_subtracts(read) or not read.switch("normalize") for read in every):
        return one_by_one(lambda read: (_divided if _is_relative(read) else _added)(read))(every)
    return one_by_one(_mean)(every)


def _is_relative(read: Readings) -> bool:
    """Say whether weights are divided by a sum that differs between blocks."""
    return read.switch("normalize") and constant_sum([*read.each("weight").values()]) is None


def _added(read: Readings) -> Counterpart:
    weights, scaling = read.each("weight"), read.shared("lambda")
    total = constant_sum([*weights.values()]) or 0.0
    is_mean = is_divided(read, total)
    numbers = by_task(read, weights, total if is_mean else 1.0)
    why = "a mean of task vectors" if is_mean else "a sum of task vectors"
    if read.base_tasks:
        return _over_own_base(read, numbers, scaling, why)
    return Counterpart("task_arithmetic", numbers, "coefficients", scaling=scaling, why=why)


def _divided(read: Readings) -> Counterpart:
    """Return a sum with the coefficients of every block: its weights, divided by their sum."""
    if read.base_tasks:
        raise read.lost("weights that are divided by sums that differ, over a base model of the slice's own")
    numbers_at, scaling = over_sum(read, read.each("weight")), read.shared("lambda")
    why = "a mean of task vectors, by coefficients of each block"
    return Counterpart(
        "task_arithmetic", numbers_at(0.0), "coefficients", scaling=scaling, why=why, numbers_at=numbers_at
    )


def _over_own_base(read: Readings, numbers: Mapping[str, Value], scaling: Value, why: str) -> Counterpart:
    """Return a sum over a slice's own base model, whose vector from the recipe's is one more task."""
    if not scaling.is_constant:
        raise read.lost("a lambda that differs between blocks, over a base model of the slice's own")
    found = {task: value.times(scaling.first) for task, value in numbers.items()}
    rest = reduce(lambda a, b: plus(read, a, b), (value.times(-1) for value in found.values()), ONE)
    for task in read.base_tasks:
        found[task] = plus(read, found[task], rest)
    return Counterpart(
        "task_arithmetic", found, "coefficients", why=f"{why}, over the slice's own base model"
    )


def _mean(read: Readings) -> Counterpart:
    if any(not read.tasks_of(number) for number in read.each("weight")):
        raise read.lost("the base model as a task of a mean whose weights differ in sum")
    numbers, scaling = shares(read, read.each("weight")), read.shared("lambda")
    why = "a mean of task vectors, by the sum of the weights in every block"
    return Counterpart("average", numbers, scaling=scaling, why=why)


def copied(read: Readings) -> Counterpart:
    """Return a copy of one model, perhaps times a factor."""
    if len(read.part.inputs) != 1:
        raise read.lost("passthrough takes one model, also in mergekit", read.part.at)
    factor = read.each("scale")[0] if read.case.picked[0, "scale"].value else ONE
    tasks = read.tasks_of(0)
    if tasks and read.family.tasks[tasks[0]] == read.part.inputs[0].reference.lora:
        if factor != ONE:
            raise read.lost("a model with an adapter times a factor", *read.places_of_each("scale"))
        return Counterpart("average", {tasks[0]: ONE}, why="the adapter added to its model")
    take, why = tasks[0] if tasks else "base_model", "copies, bit for bit"
    if not all(map(is_exact_factor, factor.points)):
        return Counterpart("single_task", take=take, factor=factor, why="copies, times a factor")
    return Counterpart("single_task", take=take, factor=factor, verdict="exact", why=why)
