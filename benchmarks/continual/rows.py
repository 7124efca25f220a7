"""Accuracies looked up in the stored results of the families of one data set and number of tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.continual.claims import LABELS, Measure

Results = Sequence[Mapping[str, Any]]

#: Method and preference of a row.
Key = tuple[str, str]

#: Source of a row's scaling coefficient: the same for all, found on each meta sample, or in hindsight.
WAYS = ("fixed", "tuned", "hindsight")


def keys(results: Results) -> list[Key]:
    """Return method and preference of every row that all families have."""
    found = [
        dict.fromkeys((row["method"], row["preference"]) for row in result["rows"]) for result in results
    ]
    return [key for key in found[0] if all(key in other for other in found)]


def scalings(results: Results) -> list[float]:
    """Return the scaling coefficients that were tried."""
    return list(results[0]["protocol"]["scalings"])


def sizes(result: Mapping[str, Any]) -> np.ndarray:
    """Return how many examples of each target are held out."""
    return np.array([target["held_out"] for target in result["targets"]])


def row_of(result: Mapping[str, Any], key: Key) -> Mapping[str, Any]:
    """Return a family's row of a method under a preference."""
    return next(row for row in result["rows"] if (row["method"], row["preference"]) == key)


def preference_of(results: Results) -> str:
    """Return the preference that stands for `labels`: the first of `LABELS` that all families have."""
    kinds = [kind for _, kind in keys(results)]
    return next((kind for kind in LABELS if kind in kinds), "uniform")


def is_measured(results: Results, key: Key, measure: Measure = "mean") -> bool:
    """Say whether all families have a row, with scores by task where the measure needs them."""
    rows = [row for result in results for row in result["rows"] if (row["method"], row["preference"]) == key]
    return len(rows) == len(results) and (measure == "mean" or all("right_by_task" in row for row in rows))


def accuracies(result: Mapping[str, Any], key: Key, measure: Measure = "mean") -> np.ndarray:
    """Return accuracy by target and scaling coefficient, of all examples or of the target's worst task."""
    row = row_of(result, key)
    if measure == "mean":
        return np.asarray(np.array(row["right"]) / sizes(result)[:, None])
    pairs = zip(row["right_by_task"], result["held_out_by_task"], strict=True)
    return np.array([worst(by_scaling, counts) for by_scaling, counts in pairs])


def worst(right: Sequence[Sequence[float]], counts: Sequence[float]) -> np.ndarray:
    """Return the accuracy of the worst task for each row of sums; tasks without examples do not count."""
    known = np.array(counts) > 0
    found: np.ndarray = (np.array(right)[:, known] / np.array(counts)[known]).min(axis=1)
    return found


def base_accuracies(result: Mapping[str, Any], measure: Measure = "mean") -> np.ndarray:
    """Return the base model's accuracy by target."""
    if measure == "mean":
        return np.asarray(np.array(result["base_model"]) / sizes(result))
    return _of_sums(result["base_model_by_task"], result, measure)


def reference_accuracies(result: Mapping[str, Any], name: str, measure: Measure = "mean") -> np.ndarray:
    """Return the accuracy by target of a model that merging is compared with, such as joint training."""
    return _of_sums(result["references"][name], result, measure)


def _of_sums(sums: Sequence[Sequence[float]], result: Mapping[str, Any], measure: Measure) -> np.ndarray:
    """Return accuracy by target, from right answers by target and task."""
    if measure == "mean":
        return np.asarray(np.array([sum(own) for own in sums]) / sizes(result))
    return np.concatenate(
        [worst([own], counts) for own, counts in zip(sums, result["held_out_by_task"], strict=True)]
    )


def hindsight(results: Results, key: Key, measure: Measure = "mean") -> int:
    """Return which coefficient does best on the held-out examples themselves, over all seeds."""
    found = np.mean([accuracies(result, key, measure).mean(axis=0) for result in results], axis=0)
    return int(found.argmax())


def by_seed(results: Results, key: Key, way: str, measure: Measure = "mean") -> list[float]:
    """Return, by seed, the mean over targets, with λ from one of the `WAYS`."""
    found = [accuracies(result, key, measure) for result in results]
    if way == "tuned":
        chosen = [np.array(row_of(result, key)["chosen"]) for result in results]
        return [mean(one[np.arange(len(one)), own]) for one, own in zip(found, chosen, strict=True)]
    fixed = results[0]["protocol"]["fixed"]
    column = scalings(results).index(fixed) if way == "fixed" else hindsight(results, key, measure)
    return [mean(one[:, column]) for one in found]


def mean(values: Sequence[float] | np.ndarray) -> float:
    """Return the mean, exactly rounded."""
    return math.fsum(values) / len(values)


def spread(values: Sequence[float]) -> list[float]:
    """Return mean and standard deviation; the mean alone of a single value."""
    return [mean(values), *([float(np.std(values, ddof=1))] if len(values) > 1 else [])]
