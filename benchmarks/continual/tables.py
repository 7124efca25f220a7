"""Tables, as plain numbers, from the stored results of the families of one data set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Results = Sequence[Mapping[str, Any]]

OURS = "tunable_magmax algorithm-1"
AGREEMENT = "agreement"
TOP_N = "tunable_magmax top-n"

#: Baselines: methods as they are without a preference.
CLAIMED = (
    ("last_task", "uniform"),
    ("random_mix", "uniform"),
    ("average", "uniform"),
    ("ties", "uniform"),
    ("magmax", "uniform"),
)

#: Source of a row's scaling coefficient: the same for all, found on each meta sample, or in hindsight.
WAYS = ("fixed", "tuned", "hindsight")


def make_tables(results: Results) -> dict[str, Any]:
    """Return every table, by the number of tasks."""
    numbers = sorted({result["num_tasks"] for result in results})
    parts = {number: [result for result in results if result["num_tasks"] == number] for number in numbers}
    tables = (
        main_table,
        paired_tests,
        agreement_tests,
        schedules,
        numbers_of_tasks,
        sample_sizes,
        selections,
        regrets,
        estimates,
    )
    return {table.__name__: {str(n): table(part) for n, part in parts.items()} for table in tables}


def main_table(results: Results) -> list[dict[str, Any]]:
    """Return accuracy by method and preference; mean and standard deviation over seeds."""
    base = [_mean(np.array(result["base_model"]) / _sizes(result)) for result in results]
    rows = [{"method": "base model", "preference": "", "fixed": _spread(base)}]
    for key in keys(results):
        found = {way: _spread(_by_seed(results, key, way)) for way in WAYS}
        scaling = _scalings(results)[_hindsight(results, key)]
        rows.append({"method": key[0], "preference": key[1], **found, "hindsight_scaling": scaling})
    return rows


def paired_tests(results: Results) -> list[dict[str, Any]]:
    """Return how far Tunable MAGMAX is ahead of every other row, and how sure that is.

    Its preference is from labels, or the known one where there is no other.
    """
    return _ahead(results, OURS)


def agreement_tests(results: Results) -> list[dict[str, Any]]:
    """Return the same for `agreement`; nothing where it was not measured."""
    return _ahead(results, AGREEMENT) if any(method == AGREEMENT for method, _ in keys(results)) else []


def _ahead(results: Results, method: str) -> list[dict[str, Any]]:
    ours = method, next(iter(results[0]["compare"]))
    return [
        {"method": other[0], "preference": other[1]}
        | {way: _paired(results, ours, other, way) for way in ("fixed", "tuned")}
        for other in keys(results)
        if other != ours
    ]


def schedules(results: Results) -> list[dict[str, Any]]:
    """Return the accuracy of the first and the last task by the schedule's ratio."""
    return _averaged(results, "schedules", ("method", "ratio"), ("first", "last"))


def numbers_of_tasks(results: Results) -> list[dict[str, Any]]:
    """Return accuracy by how many tasks the target has."""
    counted = [
        {"numbers_of_tasks": [row | {"count": len(row["tasks"])} for row in result["numbers_of_tasks"]]}
        for result in results
    ]
    return _averaged(counted, "numbers_of_tasks", ("method", "count"), ("score",))


def sample_sizes(results: Results) -> list[dict[str, Any]]:
    """Return the error of the estimate, and accuracy, by how many target examples it has seen."""
    flat = [{"rows": [row | row["scores"] for row in result["sample_sizes"]]} for result in results]
    methods = [name for result in results[:1] for row in result["sample_sizes"][:1] for name in row["scores"]]
    return _averaged(flat, "rows", ("kind", "size"), ("error", *methods))


def selections(results: Results) -> list[dict[str, Any]]:
    """Return the accuracy of both selections of Tunable MAGMAX by scaling coefficient."""
    kinds = [kind for method, kind in keys(results) if method == TOP_N]
    return [
        {"preference": kind, "scaling": scaling}
        | {
            method: _mean([_mean(_accuracies(result, (method, kind))[:, column]) for result in results])
            for method in (OURS, TOP_N)
        }
        for kind in kinds
        for column, scaling in enumerate(_scalings(results))
    ]


def regrets(results: Results) -> dict[str, Any]:
    """Return, by the recipe's preference, what a comparison's choices lose to the best fixed choice."""
    return {kind: _regret(results, kind) for kind in results[0]["compare"]}


def _regret(results: Results, kind: str) -> dict[str, Any]:
    tried = [key for key in keys(results) if key[1] in ("uniform", kind) and _is_compared(results, key[0])]
    # One row per seed, one column per candidate.
    fixed = np.array(
        [np.concatenate([_accuracies(result, key).mean(axis=0) for key in tried]) for result in results]
    )
    chosen = [
        _mean(np.array([choice["right"] for choice in result["compare"][kind]]) / _sizes(result))
        for result in results
    ]
    best = int(fixed.mean(axis=0).argmax())
    method, preference = tried[best // len(_scalings(results))]
    scaling = _scalings(results)[best % len(_scalings(results))]
    rows = [
        {"seed": result["seed"], "chosen": own, "best": float(row.max()), "regret": float(row.max()) - own}
        for result, own, row in zip(results, chosen, fixed, strict=True)
    ]
    return {
        "seeds": rows,
        "regret": _mean([row["regret"] for row in rows]),
        "best": {"method": method, "preference": preference, "scaling": scaling},
        "regret_to_best": float(fixed.mean(axis=0)[best]) - _mean(chosen),
    }


def _is_compared(results: Results, method: str) -> bool:
    """Say whether comparisons chose between a method and others."""
    return all(method in result.get("compared", (method,)) for result in results)


def estimates(results: Results) -> dict[str, float]:
    """Return, by kind, how far estimated weights are from the target's shares, summed over tasks."""
    return {kind: _mean([_mean(r["estimates"][kind]) for r in results]) for kind in results[0]["estimates"]}


def keys(results: Results) -> list[tuple[str, str]]:
    """Return method and preference of every row that all families have."""
    found = [[(row["method"], row["preference"]) for row in result["rows"]] for result in results]
    return [key for key in found[0] if all(key in other for other in found)]


def _scalings(results: Results) -> list[float]:
    return list(results[0]["protocol"]["scalings"])


def _sizes(result: Mapping[str, Any]) -> np.ndarray:
    return np.array([target["held_out"] for target in result["targets"]])


def _row(result: Mapping[str, Any], key: tuple[str, str]) -> Mapping[str, Any]:
    return next(row for row in result["rows"] if (row["method"], row["preference"]) == key)


def _accuracies(result: Mapping[str, Any], key: tuple[str, str]) -> np.ndarray:
    """Return accuracy by target and scaling coefficient."""
    return np.array(_row(result, key)["right"]) / _sizes(result)[:, None]


def _hindsight(results: Results, key: tuple[str, str]) -> int:
    """Return which coefficient does best on the held-out examples themselves, over all seeds."""
    return int(np.mean([_accuracies(result, key).mean(axis=0) for result in results], axis=0).argmax())


def _by_target(results: Results, key: tuple[str, str], way: str) -> list[np.ndarray]:
    """Return, by seed, the accuracy on every target."""
    if way == "tuned":
        return [
            _accuracies(r, key)[np.arange(len(_sizes(r))), np.array(_row(r, key)["chosen"])] for r in results
        ]
    fixed = results[0]["protocol"]["fixed"]
    column = _scalings(results).index(fixed) if way == "fixed" else _hindsight(results, key)
    return [_accuracies(result, key)[:, column] for result in results]


def _by_seed(results: Results, key: tuple[str, str], way: str) -> list[float]:
    return [_mean(values) for values in _by_target(results, key, way)]


def _paired(
    results: Results, first: tuple[str, str], second: tuple[str, str], way: str
) -> dict[str, float | None]:
    pairs = zip(_by_target(results, first, way), _by_target(results, second, way), strict=True)
    differences = [one - other for one, other in pairs]
    return {
        "difference": _mean([_mean(values) for values in differences]),
        "wilcoxon": wilcoxon_p(np.concatenate(differences)),
        "t_test": t_test_p([_mean(values) for values in differences]),
    }


def wilcoxon_p(differences: np.ndarray) -> float:
    """Return the two-sided p-value of Wilcoxon's signed ranks; 1 where nothing differs."""
    from scipy.stats import wilcoxon

    if not np.any(differences):
        return 1.0
    return float(wilcoxon(differences, zero_method="zsplit", method="approx").pvalue)


def t_test_p(differences: Sequence[float]) -> float | None:
    """Return the two-sided p-value of Student's t; 1 where nothing differs, None for a single value."""
    from scipy.stats import ttest_1samp

    if len(differences) < 2:
        return None
    if len(set(differences)) == 1:
        return 1.0
    return float(ttest_1samp(differences, 0.0).pvalue)


def _averaged(
    results: Results, name: str, by: tuple[str, ...], values: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Return the means of `values` over rows that agree in `by`: within a seed first, then over seeds."""
    groups = dict.fromkeys(tuple(row[key] for key in by) for result in results for row in result[name])

    def mean_of(group: tuple[Any, ...], value: str) -> float:
        inside: list[list[float]] = [
            [row[value] for row in result[name] if tuple(row[key] for key in by) == group]
            for result in results
        ]
        return _mean([_mean(part) for part in inside if part])

    return [
        dict(zip(by, group, strict=True)) | {value: mean_of(group, value) for value in values}
        for group in groups
    ]


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return math.fsum(values) / len(values)


def _spread(values: Sequence[float]) -> list[float]:
    """Return mean and standard deviation; the mean alone of a single value."""
    return [_mean(values), *([float(np.std(values, ddof=1))] if len(values) > 1 else [])]
