"""Gain of weights by groups of blocks over one set of weights: both searched, with as many tries, on digits.

    python -m benchmarks.groups FOLDER              print it, for families in FOLDER, learned where they lack
    python -m benchmarks.groups FOLDER --write      and store it in benchmarks/results/groups.json
    python -m benchmarks.groups --render            write the table of docs/tensors.md from what is stored

Five targets of each seed mix two or three of five tasks, as in `benchmarks.continual`. Forty examples of a
target choose, by normalised margins as `preference: search` does; the others are scored.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.optimize import minimize

from benchmarks.continual.estimating import Estimator
from benchmarks.continual.protocol import Protocol, draw_targets
from benchmarks.continual.scoring import RefilledModel
from benchmarks.continual.significance import t_test_p, wilcoxon_p
from benchmarks.continual.sources import Family, digits
from benchmarks.page_tables import replace_tables
from benchmarks.page_tables import table as page_table
from hub_magmax import merge_tensors
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.evaluators import Outcome, columns_of, get_evaluator
from hub_magmax.evaluation.evaluators.loading import load_model
from hub_magmax.evaluation.margins import normalised_margins
from hub_magmax.files import write_text
from hub_magmax.preference.search import Tried, on_simplex, search_weights
from hub_magmax.recipe.blocks import block_of

RESULTS = Path(__file__).parent / "results" / "groups.json"
PAGE = Path(__file__).parents[1] / "docs" / "tensors.md"

NUM_TASKS, NUM_CHOOSING = 5, 40
#: What is before the blocks goes with the first of them, and what is behind them with the last.
NUM_GROUPS = 3

#: Methods, by their scaling coefficient, and how many tries each search has.
RUNS = (("average", 0.5, 60), ("agreement", 1.0, 60))

ONE, BY_GROUP, AFTER_ONE = "one set", "by group", "one set, then by group"

#: Weights, "groups tasks".
Weights = np.ndarray
ValuesOf = Callable[[Weights], np.ndarray]


def by_group(values_of: ValuesOf, start: Weights, budget: int) -> list[Tried]:
    """Try weights of each group, by Nelder and Mead's method; corners are halfway from `start` to a task."""
    tried: list[Tried] = []

    def loss(flat: np.ndarray) -> float:
        weights = np.array([on_simplex(row) for row in flat.reshape(start.shape)])
        tried.append(Tried(weights, values_of(weights)))
        return -tried[-1].mean

    corners = np.repeat(start.reshape(1, -1), 1 + start.size, 0)
    for place in range(start.size):
        row = corners[1 + place].reshape(start.shape)[place // NUM_TASKS]
        row[:] = (row + np.eye(NUM_TASKS)[place % NUM_TASKS]) / 2
    minimize(
        loss, corners[0], method="Nelder-Mead",
        options={
            "initial_simplex": corners, "maxfev": budget, "adaptive": True, "xatol": 0.01, "fatol": 1e-4,
        },
    )  # fmt: skip
    return tried


def one_set(values_of: ValuesOf, budget: int) -> list[Tried]:
    """Try one set of weights for all groups, as `preference: search` does."""
    tried = search_weights(lambda weights: values_of(_for_all(weights)), NUM_TASKS, budget)
    return [Tried(_for_all(one.weights), one.values) for one in tried]


def _for_all(weights: np.ndarray) -> Weights:
    return np.repeat(weights[None], NUM_GROUPS, 0)


def _after_one(values_of: ValuesOf, budget: int) -> list[Tried]:
    first = one_set(values_of, budget // 2)
    return [*first, *by_group(values_of, best_of(first).weights, budget - len(first))]


def best_of(tried: Sequence[Tried]) -> Tried:
    """Return the first of the best."""
    return max(tried, key=lambda one: one.mean)


_UNIFORM = np.full((NUM_GROUPS, NUM_TASKS), 1 / NUM_TASKS)

SEARCHES: Mapping[str, Callable[[ValuesOf, int], list[Tried]]] = {
    ONE: one_set,
    BY_GROUP: lambda values_of, budget: by_group(values_of, _UNIFORM, budget),
    AFTER_ONE: _after_one,
}


def _group_of(tensor: str) -> int:
    block = block_of(tensor)
    return block.number if block else 0 if "embeddings" in tensor else NUM_GROUPS - 1


class Bench:
    """A family's checkpoints, merged with weights by group, and a model that takes what comes out.

    Both methods look at one element at a time, so that a group's tensors are merged as one vector.
    """

    def __init__(self, family: Family) -> None:
        self.family, self.targets = family, draw_targets(family.owners, Protocol(draws=1), family.seed)
        self._evaluator = get_evaluator("image-classification").make()
        kinds = self._evaluator.model_class, self._evaluator.processor_class
        self._model = RefilledModel(load_model(ModelPlace(str(family.base_model)), *kinds, "groups"))
        base, *tasks = (
            load_file(place / "model.safetensors") for place in (family.base_model, *family.tasks.values())
        )
        self._names = [[name for name in base if _group_of(name) == group] for group in range(NUM_GROUPS)]
        self._base = base
        self._vectors = [
            torch.stack([torch.cat([(task[n] - base[n]).flatten() for n in names]) for task in tasks])
            for names in self._names
        ]

    def batches(self, rows: Sequence[int]) -> list[Any]:
        examples, columns = self.family.test.select(rows), columns_of(self.family.columns)
        return list(self._evaluator.encode(self._model.loaded, examples, columns, 256))

    def outcomes(
        self, method: str, scaling: float, weights: Weights, batches: Sequence[Any]
    ) -> Sequence[Outcome]:
        """Return what the model whose groups have these weights does on encoded examples."""
        tensors = {}
        for names, vectors, row in zip(self._names, self._vectors, weights, strict=True):
            merged = merge_tensors(vectors, preference=row.tolist(), method=method)
            sizes = [self._base[name].numel() for name in names]
            for name, part in zip(names, merged.split(sizes), strict=True):
                tensors[name] = self._base[name] + scaling * part.view_as(self._base[name])
        return self._evaluator.outcomes(self._model.with_weights(tensors), batches)

    def searched(self, method: str, scaling: float, budget: int) -> list[dict[str, Any]]:
        """Return, for each search, the accuracy of its choice on what is left of each target."""
        found = []
        for name, search in SEARCHES.items():
            accuracies, margins, counts = [], [], []
            for target in self.targets:
                choosing = self.batches(target.rows[:NUM_CHOOSING])

                def values_of(weights: Weights, choosing: list[Any] = choosing) -> np.ndarray:
                    return normalised_margins(self.outcomes(method, scaling, weights, choosing))

                tried = search(values_of, budget)
                best = best_of(tried)
                accuracies.append(self.accuracy(method, scaling, best.weights, target.rows[NUM_CHOOSING:]))
                margins.append(round(best.mean, 4))
                counts.append(len(tried))
            found.append({"search": name, "accuracy": accuracies, "margin": margins, "tries": counts})
        return found

    def by_labels(self, method: str, scaling: float) -> list[float]:
        """Return the accuracies with the preference that the labels of the choosing examples give."""
        estimator = Estimator(self.family)
        found = []
        for target in self.targets:
            weights = estimator.weights("labels", target, target.rows[:NUM_CHOOSING])
            found.append(
                self.accuracy(method, scaling, _for_all(np.array(weights)), target.rows[NUM_CHOOSING:])
            )
        return found

    def accuracy(self, method: str, scaling: float, weights: Weights, rows: Sequence[int]) -> float:
        outcomes = self.outcomes(method, scaling, weights, self.batches(rows))
        return round(100 * statistics.fmean(outcome.score for outcome in outcomes), 2)


def measured(family: Family) -> list[dict[str, Any]]:
    """Return the results of one family: a row for each method, number of tries and search."""
    bench, rows = Bench(family), []
    for method, scaling, budget in RUNS:
        labels = {"search": "labels", "accuracy": bench.by_labels(method, scaling)}
        about = {"seed": family.seed, "method": method, "scaling": scaling, "budget": budget}
        rows += [about | row for row in (labels, *bench.searched(method, scaling, budget))]
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of docs/tensors.md."""

    def by_seed(run: tuple[str, float, int], search: str) -> list[list[float]]:
        return [
            row["accuracy"]
            for row in sorted(rows, key=lambda row: row["seed"])
            if (row["method"], row["scaling"], row["budget"], row["search"]) == (*run, search)
        ]

    heads = ("method", "tries", "labels", "one set", "by group", "ahead", "one set, then by group", "ahead")
    lines = []
    for run in RUNS:
        one = by_seed(run, ONE)
        cells = [f"`{run[0]}`, λ = {run[1]:g}", str(run[2]), _spread(by_seed(run, "labels")), _spread(one)]
        for search in (BY_GROUP, AFTER_ONE):
            found = by_seed(run, search)
            cells += [_spread(found), _ahead(found, one)]
        lines.append(cells)
    return page_table(heads, lines)


def _spread(seeds: Sequence[Sequence[float]]) -> str:
    means = [statistics.fmean(found) for found in seeds]
    return f"{statistics.fmean(means):.1f} ± {statistics.stdev(means):.1f}"


def _ahead(found: Sequence[Sequence[float]], one: Sequence[Sequence[float]]) -> str:
    """Return the difference, with p of Wilcoxon's test over the targets and of a t-test over the seeds."""
    differences = np.array(found) - np.array(one)
    over_seeds = t_test_p(differences.mean(axis=1).tolist())
    shown = "unknown" if over_seeds is None else f"{over_seeds:.2g}"
    return f"{differences.mean():+.1f} ({wilcoxon_p(differences.reshape(-1)):.2g}; {shown})"


def render() -> None:
    """Write the table into the page, in place of the one that is there."""
    found = table(json.loads(RESULTS.read_text(encoding="utf-8")))
    replace_tables(PAGE, r"\| method \| tries \|.*\n(\|.*\n)+", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("experiments"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--write", action="store_true", help="store the numbers")
    parser.add_argument("--render", action="store_true", help="write the table from the stored numbers alone")
    options = parser.parse_args()
    if options.render:
        render()
        return
    rows = []
    for seed in options.seeds:
        for row in measured(digits(options.folder, NUM_TASKS, seed)):
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.write:
        write_text(RESULTS, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
