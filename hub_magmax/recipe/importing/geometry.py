"""Counterparts of methods of lengths and angles, and of those that look at single elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hub_magmax.recipe.importing.counterparts import ONE, Counterpart, by_task, one_by_one, shares
from hub_magmax.recipe.importing.parameters import Value, constant_sum
from hub_magmax.recipe.importing.readings import Readings


def slerp(every: Sequence[Readings]) -> list[Counterpart]:
    """Return the way from the base model to the other one, or between two tasks where bases differ."""
    is_one = not any(read.base_tasks for read in every)
    return one_by_one(_from_base if is_one else _between)(every)


def _from_base(read: Readings) -> Counterpart:
    read = _played(read)
    t, (other,) = _share(read), _others(read, 1)
    numbers, counts_base = by_task(read, {other: ONE}), _counts_base(read)
    why = "the way from the base model, t, along the arc between whole models"
    return Counterpart("slerp", numbers, options={"t": t}, why=why, counts_base=counts_base)


def _between(read: Readings) -> Counterpart:
    read = read.with_base
    t, (other,) = _share(read), _others(read, 1)
    base = next(number for number, one in enumerate(read.part.inputs) if one.is_base)
    rest = Value(tuple(1 - point for point in t.points))
    why = "between two models, as far as t says, from the base model of the slice"
    numbers = by_task(read, {base: rest, other: t})
    return Counterpart("slerp", numbers, options={"t": ONE}, why=why, counts_base=True)


def _share(read: Readings) -> Value:
    """Return t, which is from 0 to 1."""
    found = read.shared("t")
    if not 0 <= min(found.points) <= max(found.points) <= 1:
        raise read.lost("t is from 0 to 1 here", read.place_of("t"))
    return found


def _others(read: Readings, count: int) -> tuple[int, ...]:
    """Return the models beside the base model, which are so many."""
    found = tuple(read.numbers())
    if len(found) != count:
        why = f"{read.method} takes {count} beside the base model, also in mergekit"
        raise read.lost(why, read.part.at)
    return found


def _played(read: Readings) -> Readings:
    """Return the case with the base model as a task, where it is one for mergekit.

    Without a base model one of the models plays it; and a model may be the base model under another spelling.
    """
    return read if read.has_base and all(map(read.tasks_of, read.numbers())) else read.with_base


def _counts_base(read: Readings) -> bool:
    return read.family.base in read.family.tasks.values()


def _of(read: Readings) -> dict[str, Any]:
    """Return whose angles count: those of task vectors, or without a base model those of whole models."""
    return {"of": "task_vectors" if read.has_base else "models"}


def nuslerp(read: Readings) -> Counterpart:
    """Return the arc between two task vectors, or two models."""
    read = _played(read)
    first, second = _others(read, 2)
    weights = read.each("weight")
    if constant_sum([*weights.values()]) == 0 and all(value.is_constant for value in weights.values()):
        weights = {first: ONE, second: ONE}  # mergekit goes half way
    options = _of(read) | {"each": "tensor", "zeros": "right_angle"}
    if not read.switch("nuslerp_flatten"):
        options["each"] = "column" if read.switch("nuslerp_row_wise") else "row"
    why = f"between two {_vectors(read)}, as far as the second weight says"
    numbers = shares(read, weights)
    return Counterpart("nuslerp", numbers, options=options, why=why, counts_base=_counts_base(read))


def _vectors(read: Readings) -> str:
    return "task vectors" if read.has_base else "whole models"


def multislerp(read: Readings) -> Counterpart:
    """Return the mean direction, as long as the vectors are in the mean."""
    read = _played(read)
    if read.number("eps") > 1e-8:
        raise read.lost(
            "eps is up to 1e-8: more of it turns and shortens what is merged", read.place_of("eps")
        )
    weights, scaling = read.each("weight"), ONE
    if len(weights) == 1:  # mergekit copies a model that is alone, whatever its weight
        weights = dict.fromkeys(weights, ONE)
    elif not read.switch("normalize_weights"):
        total = constant_sum([*weights.values()])
        if total is None or not (read.has_base or total == 1):
            raise read.lost("weights that are not divided by their sum", read.place_of("normalize_weights"))
        scaling = Value((total,))
    why = f"the mean direction of the {_vectors(read)}, with their mean length"
    return Counterpart(
        "multislerp",
        shares(read, weights),
        options=_of(read),
        scaling=scaling,
        why=why,
        counts_base=_counts_base(read),
    )


def karcher(read: Readings) -> Counterpart:
    """Return the Karcher mean of whole models, a base model that is listed or not included."""
    read = read.with_base
    if any(one.at is read.part.base_at for one in read.part.inputs):
        read.warn("the base model is not listed, and mergekit averages it in as one more model")
    every = dict.fromkeys(range(len(read.part.inputs)), ONE)
    options = {"of": "models", "max_iter": _whole(read, "max_iter"), "tol": read.shared("tol")}
    why = "the Karcher mean of the models' directions, with their mean length"
    return Counterpart("karcher", by_task(read, every), options=options, why=why, counts_base=True)


def _whole(read: Readings, name: str) -> int:
    found = read.number(name)
    if found != int(found) or found < 1:
        raise read.lost(f"{name} is a whole number from 1", read.place_of(name))
    return int(found)


def model_stock(read: Readings) -> Counterpart:
    """Return the mean of the task vectors, shortened by the angles between them."""
    read = _played(read)
    others = tuple(read.numbers())
    if len(others) < 2:
        raise read.lost("model_stock takes two models at least, also in mergekit", read.part.at)
    options = {"each": "row" if read.switch("filter_wise") else "tensor", "backwards": True, "floor": 1e-6}
    why = "the mean of the task vectors, shortened by their angles; small ones are pulled to the base model"
    numbers, counts_base = by_task(read, dict.fromkeys(others, ONE)), _counts_base(read)
    return Counterpart("model_stock", numbers, options=options, why=why, counts_base=counts_base)


def arcee_fusion(read: Readings) -> Counterpart:
    """Return the important elements of one task."""
    (other,) = _others(read, 1)
    why = "the important elements: those at the limit may fall to the other side, and of more than a million "
    why += "mergekit draws those that set it"
    return Counterpart("arcee_fusion", by_task(read, {other: ONE}), verdict="in expectation", why=why)


def nearswap(read: Readings) -> Counterpart:
    """Return one task, each element of whose vector is at most so long."""
    (other,) = _others(read, 1)
    limit = read.shared("t")
    if min(limit.points) < 1e-6:
        raise read.lost("t is 1e-6 at least: mergekit takes smaller differences for that", read.place_of("t"))
    why = "elements of the task vector, cut to t"
    return Counterpart("nearswap", by_task(read, {other: ONE}), options={"limit": limit}, why=why)


def sce(read: Readings) -> Counterpart:
    """Return the mean by energy of the tasks that agree, over the elements on which they differ most."""
    read = _played(read)
    topk = read.shared("select_topk")
    if min(topk.points) <= 0:
        raise read.lost("select_topk is above 0: nothing would be left", read.place_of("select_topk"))
    density = Value(tuple(min(point, 1.0) for point in topk.points)).simplest
    others = dict.fromkeys(read.numbers(), ONE)
    if len(others) == 1 and density != ONE:
        why = "one model differs from no other, so that nothing is selected and the base model is copied"
        return Counterpart("single_task", take="base_model", verdict="exact", why=why)
    rounding = {} if density == ONE else {"rounding": "down"}
    options = {"density": density, **rounding, "floor": 1e-6}
    why = "the mean of the tasks that agree, by their mean squares over what is selected, per tensor; all "
    why += "count equally where these sum to less than 1e-6, as in many language models"
    return Counterpart("sce", by_task(read, others), options=options, why=why, counts_base=_counts_base(read))


def ram(read: Readings) -> Counterpart:
    """Return what single tasks changed, and the mean of what several did."""
    numbers = by_task(read, dict.fromkeys(read.numbers(), ONE))
    options: dict[str, Any] = {"epsilon": read.shared("epsilon")}
    if read.method == "ramplus_tl" and min(options["epsilon"].points) <= 0:
        why = "epsilon is above 0: mergekit divides by it where a model changed no element alone"
        raise read.lost(why, read.place_of("epsilon"))
    if read.method == "ram":
        return Counterpart("ram", numbers, options=options, why="what one task changed, and means of several")
    options |= {"boost": read.shared("r"), "boost_limit": read.shared("alpha")}
    why = "what one task changed, enlarged, and means of several"
    return Counterpart("ram_plus", numbers, options=options, why=why)
