"""Tables, as plain numbers, from the stored results of the families of one data set."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.continual.claims import Measure
from benchmarks.continual.rows import (
    WAYS,
    Key,
    Results,
    accuracies,
    base_accuracies,
    by_seed,
    hindsight,
    is_measured,
    keys,
    mean,
    preference_of,
    reference_accuracies,
    scalings,
    sizes,
    spread,
)
from benchmarks.continual.significance import holm, paired
from benchmarks.continual.verdicts import verdicts

OURS = "tunable_magmax algorithm-1"
AGREEMENT = "agreement"
TOP_N = "tunable_magmax top-n"


def make_tables(results: Results) -> dict[str, Any]:
    """Return every table, by the number of tasks."""
    numbers = sorted({result["num_tasks"] for result in results})
    parts = {number: [result for result in results if result["num_tasks"] == number] for number in numbers}
    tables = (
        preference_of,
        main_table,
        paired_tests,
        agreement_tests,
        schedules,
        numbers_of_tasks,
        sample_sizes,
        sample_losses,
        selections,
        regrets,
        estimates,
    )
    found = {table.__name__: {str(n): table(part) for n, part in parts.items()} for table in tables}
    return {"claims": {str(n): rows for n, rows in verdicts(parts).items()}, **found}


def main_table(results: Results) -> list[dict[str, Any]]:
    """Return accuracy by method and preference; mean and standard deviation over seeds.

    `worst` has the same for the worst task of each target, where scores by task are stored.
    """
    base: dict[str, Any] = {"fixed": spread([mean(base_accuracies(result)) for result in results])}
    if all("base_model_by_task" in result for result in results):
        base["worst"] = {"fixed": spread([mean(base_accuracies(result, "worst")) for result in results])}
    rows = [{"method": "base model", "preference": "", **base}, *_references(results)]
    for key in keys(results):
        found = _by_way(results, key, "mean")
        if is_measured(results, key, "worst"):
            found["worst"] = _by_way(results, key, "worst")
        rows.append({"method": key[0], "preference": key[1], **found})
    return rows


def _references(results: Results) -> list[dict[str, Any]]:
    """Return the rows of what merging is compared with: each example's own checkpoint, joint training."""
    every = [result.get("references", {}) for result in results]
    names = [name for name in every[0] if all(name in own for own in every)]

    def found(name: str, measure: Measure) -> dict[str, list[float]]:
        return {"fixed": spread([mean(reference_accuracies(result, name, measure)) for result in results])}

    return [
        {"method": name, "preference": "", **found(name, "mean"), "worst": found(name, "worst")}
        for name in names
    ]


def _by_way(results: Results, key: Key, measure: Measure) -> dict[str, Any]:
    scaling = scalings(results)[hindsight(results, key, measure)]
    found = {way: spread(by_seed(results, key, way, measure)) for way in WAYS}
    return {**found, "hindsight_scaling": scaling}


def paired_tests(results: Results) -> list[dict[str, Any]]:
    """Return how far Tunable MAGMAX is ahead of every other row, and how sure that is.

    Its preference is from labels, or the known one where there is no other. Holm's correction is over the
    rows, for each source of λ by itself. Nothing where it was not measured.
    """
    return _ahead(results, OURS)


def agreement_tests(results: Results) -> list[dict[str, Any]]:
    """Return the same for `agreement`."""
    return _ahead(results, AGREEMENT)


# Complex by its comprehensions.
def _ahead(results: Results, method: str) -> list[dict[str, Any]]:
    ours = method, preference_of(results)
    if not is_measured(results, ours):
        return []
    others = [key for key in keys(results) if key != ours]
    rows: list[dict[str, Any]] = [{"method": method, "preference": kind} for method, kind in others]
    for way in ("fixed", "tuned"):
        tests = [_difference(results, ours, other, way) for other in others]
        corrected = iter(holm([test["p"] for test in tests if test["p"] is not None], len(tests)))
        for row, test in zip(rows, tests, strict=True):
            row[way] = test | {"holm": None if test["p"] is None else next(corrected)}
    return rows


def _difference(results: Results, first: Key, second: Key, way: str) -> dict[str, Any]:
    pairs = zip(by_seed(results, first, way), by_seed(results, second, way), strict=True)
    return paired([one - other for one, other in pairs]).to_dict()


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


def sample_losses(results: Results) -> list[dict[str, Any]]:
    """Return what fewer target examples lose to the most that were tried, with the seed as unit."""
    flat = [row | {"seed": result["seed"]} for result in results for row in result["sample_sizes"]]
    if not flat:
        return []
    largest = max(row["size"] for row in flat)

    def of_seeds(kind: str, method: str, size: int) -> list[float]:
        found: dict[int, list[float]] = {}
        for row in flat:
            if (row["kind"], row["size"]) == (kind, size):
                found.setdefault(row["seed"], []).append(row["scores"][method])
        return [mean(values) for values in found.values()]

    cases = dict.fromkeys((row["kind"], method, row["size"]) for row in flat for method in row["scores"])
    return [
        {"kind": kind, "method": method, "size": size, "largest": largest}
        | paired(
            [
                most - few
                for most, few in zip(
                    of_seeds(kind, method, largest), of_seeds(kind, method, size), strict=True
                )
            ]
        ).to_dict()
        for kind, method, size in cases
        if size < largest
    ]


def selections(results: Results) -> list[dict[str, Any]]:
    """Return the accuracy of both selections of Tunable MAGMAX by scaling coefficient."""
    kinds = [kind for method, kind in keys(results) if method == TOP_N and is_measured(results, (OURS, kind))]
    return [
        {"preference": kind, "scaling": scaling}
        | {
            method: mean([mean(accuracies(result, (method, kind))[:, column]) for result in results])
            for method in (OURS, TOP_N)
        }
        for kind in kinds
        for column, scaling in enumerate(scalings(results))
    ]


def regrets(results: Results) -> dict[str, Any]:
    """Return, by the recipe's preference, what a comparison's choices lose to the best fixed choice."""
    return {kind: _regret(results, kind) for kind in results[0]["compare"]}


def _regret(results: Results, kind: str) -> dict[str, Any]:
    tried = [key for key in keys(results) if key[1] in ("uniform", kind) and _is_compared(results, key[0])]
    # One row per seed, one column per candidate.
    fixed = np.array(
        [np.concatenate([accuracies(result, key).mean(axis=0) for key in tried]) for result in results]
    )
    chosen = [
        mean(np.array([choice["right"] for choice in result["compare"][kind]]) / sizes(result))
        for result in results
    ]
    best, num_scalings = int(fixed.mean(axis=0).argmax()), len(scalings(results))
    (method, preference), scaling = tried[best // num_scalings], scalings(results)[best % num_scalings]
    rows = [
        {"seed": result["seed"], "chosen": own, "best": float(row.max()), "regret": float(row.max()) - own}
        for result, own, row in zip(results, chosen, fixed, strict=True)
    ]
    return {
        "seeds": rows,
        "regret": mean([row["regret"] for row in rows]),
        "best": {"method": method, "preference": preference, "scaling": scaling},
        "regret_to_best": float(fixed.mean(axis=0)[best]) - mean(chosen),
        "test": paired((fixed.max(axis=1) - chosen).tolist()).to_dict(),
        "test_to_best": paired((fixed[:, best] - chosen).tolist()).to_dict(),
    }


def _is_compared(results: Results, method: str) -> bool:
    """Say whether comparisons chose between a method and others."""
    return all(method in result.get("compared", (method,)) for result in results)


def estimates(results: Results) -> dict[str, float]:
    """Return, by kind, how far estimated weights are from the target's shares, summed over tasks."""
    return {kind: mean([mean(r["estimates"][kind]) for r in results]) for kind in results[0]["estimates"]}


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
        return mean([mean(part) for part in inside if part])

    return [
        dict(zip(by, group, strict=True)) | {value: mean_of(group, value) for value in values}
        for group in groups
    ]
