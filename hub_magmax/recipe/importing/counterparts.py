"""Methods of recipes that compute what methods of mergekit do, with their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hub_magmax.recipe.importing.findings import Verdict
from hub_magmax.recipe.importing.readings import LostError, Readings

#: Below this a sum of weights counts as 0, and mergekit divides by 1.
_ZERO = 1e-8


@dataclass(frozen=True)
class Counterpart:
    """A method of a recipe with its numbers.

    Attributes:
        method: Name, options and scaling.
        kind: `weights` or `coefficients`.
        numbers: By task.
        verdict: Of the method as a whole.
        why: What it does.
        rules: For `tensors`.
        neutral: Parameters that change nothing.
    """

    method: Mapping[str, Any]
    kind: str
    numbers: Mapping[str, float]
    verdict: Verdict
    why: str
    rules: tuple[Mapping[str, Any], ...] = ()
    neutral: tuple[str, ...] = ()


def counterpart_of(read: Readings) -> Counterpart | None:
    """Return what computes the same, and note it; None, noted, where nothing does."""
    maker = _MAKERS.get(read.method)
    try:
        if maker is None:
            raise read.lost(f"there is no method here that computes what {read.method} does")
        found = maker(read)
    except LostError:
        return None
    read.notes.add(read.configuration.method_at, found.verdict, found.why)
    return found


def _linear(read: Readings) -> Counterpart:
    weights, normalize = read.each("weight"), read.switch("normalize")
    total = math.fsum(weights.values())
    sums_to_one = abs(total - 1) <= 1e-9
    if normalize and abs(total) < _ZERO:
        raise read.lost("weights that sum to 0, where mergekit writes NaN")
    if not (normalize or sums_to_one):
        why = f"weights that sum to {total:g} scale the base model too"
        raise read.lost(why, read.place_of("normalize"))
    found = _mean(_by_task(read, weights, total), 1.0)
    return replace(found, neutral=("normalize",) if sums_to_one else ())


def _mean(numbers: Mapping[str, float], scaling: float) -> Counterpart:
    """Return a mean of task vectors, or their sum where a number is negative."""
    total = math.fsum(numbers.values())
    if total > 0 and min(numbers.values()) >= 0:
        shares = {task: number / total for task, number in numbers.items()}
        method = {"name": "average", "scaling": short(scaling * total)}
        return Counterpart(method, "weights", shares, "rounding", "the weighted mean of the models")
    why = "the weighted mean of the models, as a sum of task vectors"
    method = {"name": "task_arithmetic", "scaling": short(scaling)}
    return Counterpart(method, "coefficients", numbers, "rounding", why)


def _by_task(read: Readings, weights: Mapping[int, float], divisor: float = 1.0) -> dict[str, float]:
    """Return the coefficient of every task's vector."""
    found = dict.fromkeys(read.family.tasks, 0.0)
    for number, weight in weights.items():
        for task in read.family.parts.get(number, ()):
            found[task] += weight / divisor
    return found


def _summed(read: Readings) -> Counterpart:
    weights, normalize, scaling = read.each("weight"), read.switch("normalize"), read.number("lambda")
    _check_rescaling(read)
    total = math.fsum(weights.values())
    divisor = total if normalize and abs(total) >= _ZERO else 1.0
    numbers, options = _by_task(read, weights, divisor), _options(read)
    name = {"dare_linear": "dare"}.get(read.method, read.method)
    why = "a sum of task vectors" if divisor == 1.0 else "a mean of task vectors"
    if options.get("density") == 1:
        why, name, options = f"{why}: nothing is dropped", "task_arithmetic", {}
    verdict: Verdict = "rounding"
    if name == "dare":
        why += "; mergekit scales what is left to the L1 norm that was there, here by 1/density"
        verdict = "in expectation"
    method = {"name": name, **options, "scaling": short(scaling)}
    return Counterpart(method, "coefficients", numbers, verdict, why)


def _elected(read: Readings) -> Counterpart:
    weights, normalize, scaling = read.each("weight"), read.switch("normalize"), read.number("lambda")
    _check_rescaling(read)
    if not normalize:
        default = "" if read.is_written("normalize") else f" (the default of {read.method})"
        why = f"normalize: false{default} sums the tasks that agree, where a method here takes their mean"
        raise read.lost(why, read.place_of("normalize"))
    numbers, options = _by_task(read, weights), _options(read)
    total = math.fsum(numbers.values())
    if total <= 0 or min(numbers.values()) < 0:
        raise read.lost("weights below 0 are no shares of the tasks")
    shares = {task: number / total for task, number in numbers.items()}
    verdict: Verdict = "in expectation" if read.method == "dare_ties" else "rounding"
    if options["density"] < 1 and read.method == "ties":
        more = "one element of a tensor more is kept where density times its size is no whole number"
        read.notes.add(read.configuration.method_at, "warning", more)
    method = {"name": read.method, **options, "scaling": short(scaling)}
    return Counterpart(method, "weights", shares, verdict, "the mean of the tasks that agree in sign")


def _check_rescaling(read: Readings) -> None:
    """Raise where `rescale` is not what the method here does; only what was dropped is scaled up."""
    how = read.configuration.method
    if read.switch("rescale") is not how.shared["rescale"] and "density" in how.each:
        raise read.lost(f"{read.method} here always does, or never does", read.place_of("rescale"))


def _options(read: Readings) -> dict[str, float]:
    """Return density and outliers, which are the same for all tasks."""
    found = {
        name: _common(read, name) for name in ("density", "gamma") if name in read.configuration.method.each
    }
    if "density" in found and found["density"] <= 0:
        for at in read.places_of_each("density"):
            read.lost("a density is above 0: nothing would be left", at)
        raise LostError
    if "density" in found:
        found["density"] = min(found["density"], 1.0)
    if "gamma" in found:
        found["outliers"] = short(max(0.0, min(found.pop("gamma"), 1 - found["density"])))
    return found


def _common(read: Readings, name: str) -> float:
    """Return the one value that a parameter has for all tasks."""
    own = {value for number, value in read.each(name).items() if read.family.parts[number]}
    if len(own) <= 1:
        return own.pop() if own else 1.0
    for at in read.places_of_each(name):
        read.lost(f"a {name} of its own for each model", at)
    raise LostError


def _copied(read: Readings) -> Counterpart:
    if len(read.part.inputs) != 1:
        raise read.lost("passthrough takes one model, also in mergekit", read.part.at)
    condition = read.case.picked[0, "scale"].condition
    if condition and condition.value.number() != 1:
        raise read.lost("tensors times a factor", condition.at)
    if not read.family.tasks:
        method = {"name": "single_task", "scaling": 1.0}
        rules = ({"match": "*", "take": "base_model"},)
        return Counterpart(method, "weights", {}, "exact", "a copy, bit for bit", rules)
    (task,) = read.family.tasks
    method = {"name": "average", "scaling": 1.0}
    return Counterpart(method, "weights", {task: 1.0}, "rounding", "the adapter added to its model")


_MAKERS: Mapping[str, Callable[[Readings], Counterpart]] = {
    "linear": _linear,
    "task_arithmetic": _summed,
    "dare_linear": _summed,
    "breadcrumbs": _summed,
    "ties": _elected,
    "dare_ties": _elected,
    "passthrough": _copied,
}


def short(value: float) -> float:
    """Return a number as a person would write it, where nothing is lost that counts."""
    return float(f"{value:.12g}")
