"""Counterparts of mergekit's methods: a method of a recipe with its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hub_magmax.recipe.importing.findings import Verdict
from hub_magmax.recipe.importing.parameters import Value, constant, sums_of
from hub_magmax.recipe.importing.readings import LostError, Readings

T = TypeVar("T")

#: Where nothing is scaled, and where nothing counts.
ONE, ZERO = constant(1.0), constant(0.0)

#: Below this a sum of weights counts as 0, and mergekit divides by 1.
SUM_OF_ZERO = 1e-8


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
        numbers_at: Takes the share of the way through the blocks, and returns the numbers of a block, where
            no gradients say these; `numbers` are then those of tensors outside of blocks.
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
    numbers_at: Callable[[float], Mapping[str, Value]] | None = None


#: Makes the counterparts of all cases.
Maker = Callable[[Sequence[Readings]], list[Counterpart]]


def one_by_one(make: Callable[[Readings], T]) -> Callable[[Sequence[Readings]], list[T]]:
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


def is_divided(read: Readings, total: float | None) -> bool:
    """Say whether weights are divided by their sum, None where that differs; warn of a sum of 0."""
    is_mean, is_zero = read.switch("normalize"), total is not None and abs(total) < SUM_OF_ZERO
    if is_mean and is_zero:
        read.warn("weights that sum to 0, where mergekit divides by 1: it adds them in spite of normalize")
    return is_mean and not is_zero


def by_task(read: Readings, weights: Mapping[int, Value], divisor: float = 1.0) -> dict[str, Value]:
    """Return the number of every task from those of the models; 0 of tasks that do not take part."""
    found = dict.fromkeys(read.family.tasks, ZERO)
    for number, weight in weights.items():
        for task in read.tasks_of(number):
            found[task] = plus(read, found[task], weight.times(1 / divisor))
    return found


def over_sum(read: Readings, weights: Mapping[int, Value]) -> Callable[[float], dict[str, Value]]:
    """Return what gives the number of every task at a share of the way: weights divided by their sum.

    Raises:
        LostError: If the sum passes 0 on the way.
    """
    sums = sums_of([*weights.values()])
    if min(sums) < SUM_OF_ZERO and max(sums) > -SUM_OF_ZERO:
        why = "weights that are divided by their sum, which is 0 on the way through the blocks"
        raise read.lost(why, *read.places_of_each("weight"))

    def numbers_at(share: float) -> dict[str, Value]:
        own = {number: constant(value.at(share)) for number, value in weights.items()}
        return by_task(read, own, math.fsum(value.first for value in own.values()))

    return numbers_at


def plus(read: Readings, one: Value, other: Value) -> Value:
    """Return the sum of two values of the same points.

    Raises:
        LostError: If their points lie elsewhere.
    """
    most = max(len(one.points), len(other.points))
    if {len(one.points), len(other.points)} - {1, most}:
        raise read.lost("gradients of different lengths, which are added")
    shares = [n / (most - 1) if most > 1 else 0.0 for n in range(most)]
    return Value(tuple(one.at(share) + other.at(share) for share in shares)).simplest


def shares(read: Readings, weights: Mapping[int, Value]) -> dict[str, Value]:
    """Return weights by task that are relative to their sum.

    Raises:
        LostError: If one is below 0, all are 0, or a model is two tasks, which would count it twice.
    """
    points = [point for value in weights.values() for point in value.points]
    if min(points, default=0) < 0:
        raise read.lost("a mean with weights below 0", *read.places_of_each("weight"))
    if not all(sums_of([*weights.values()])):
        raise read.lost("a mean with weights of 0 alone, all over or in some blocks")
    if double := [number for number in weights if len(read.tasks_of(number)) > 1]:
        why = "an adapter on another model than the base model, where the weights of a mean differ in sum"
        raise read.lost(why, *(read.part.inputs[number].at for number in double))
    return by_task(read, weights)


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
