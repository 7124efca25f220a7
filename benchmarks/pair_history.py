"""A history of merges of our own: does a prediction choose a method or a partner better than a fixed choice?

    python -m benchmarks.pair_history FOLDER ... --write   # each with recipe.yaml, checkpoints and data
    python -m benchmarks.pair_history --render             # the table of docs/mergeability.md again

Folders are those of `hub-magmax quickstart` (digits, of any seed) and of `python -m benchmarks.wordnet`. All
pairs of their tasks are merged by six methods at their default scaling, with equal weights, and scored on
both tasks' test examples. Then each pair is left out in turn, and every way of choosing knows the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.continual.scoring import Scorer
from benchmarks.page_tables import replace_tables
from benchmarks.page_tables import table as page_table
from hub_magmax.analysis.mergeability import (
    Cases,
    Predictor,
    additive,
    as_cases,
    leave_tasks_out,
    left_after_additive,
    ridge,
)
from hub_magmax.analysis.pair_sums import measured_pairs
from hub_magmax.evaluation.scoring import load_evaluation_data
from hub_magmax.files import write_text
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import load_recipe, updated
from hub_magmax.recipe.matching import locked_method
from hub_magmax.recipe.schema import Method, Recipe
from hub_magmax.reporting.pair_metrics import METRICS

RESULTS = Path(__file__).parent / "results" / "pair_history.json"
PAGE = Path(__file__).parents[1] / "docs" / "mergeability.md"

METHODS = ("average", "task_arithmetic", "ties", "tsv", "iso_c", "agreement")
_PUBLISHED = {metric.name for metric in METRICS if metric.is_as_published}


def measure(folder: Path) -> dict[str, Any]:
    """Return what every method keeps of every pair of a folder's tasks, and the metrics of the pairs."""
    recipe = updated(load_recipe(folder / "recipe.yaml"), {"method": "average", "preference": None})
    tasks = recipe.task_names
    found = measured_pairs(plan(recipe, lock(recipe)), 10, 10, report=print)
    rows = []
    for pair, metrics in found.pairs(tasks).items():
        kept = kept_of(of_tasks(recipe, pair))
        told = {name: float(f"{value:.6g}") for name, value in metrics.items()}
        rows.append({"tasks": pair, "kept": {name: round(v, 6) for name, v in kept.items()}, "metrics": told})
        print(folder.name, *pair, {name: round(value, 3) for name, value in kept.items()}, flush=True)
    return {"family": folder.name, "pairs": rows}


def of_tasks(recipe: Recipe, tasks: Sequence[str]) -> Recipe:
    """Return the recipe with some of its tasks alone."""
    values = recipe.to_dict()
    evaluation = dict(values["evaluation"])
    evaluation["tasks"] = {task: evaluation["tasks"][task] for task in tasks}
    chosen = [task for task in values["tasks"] if task["name"] in tasks]
    return updated(recipe, {"tasks": chosen, "evaluation": evaluation})


def kept_of(recipe: Recipe) -> dict[str, float]:
    """Return by method the mean over two tasks of the merged model's accuracy over the own checkpoint's."""
    spec, data = recipe.evaluation, load_evaluation_data(recipe, lock(recipe))
    assert spec is not None
    with Scorer(recipe) as scorer:
        batches = [scorer.encode(data[task], spec.tasks[task]) for task in recipe.task_names]

        def accuracy(name: str, weights: tuple[float, ...], own: Sequence[Any]) -> float:
            method = Method(name=name)
            (trial,) = scorer.trials(method, [locked_method(method)["scaling"]], weights, own)
            return statistics.fmean(outcome.score for outcome in trial.outcomes)

        owns = [
            accuracy("average", one, own) for one, own in zip([(1.0, 0.0), (0.0, 1.0)], batches, strict=True)
        ]
        return {
            name: statistics.fmean(
                accuracy(name, (0.5, 0.5), batch) / own for batch, own in zip(batches, owns, strict=True)
            )
            for name in METHODS
        }


class History:
    """The cases of one family by method, and the choices that may be made with one pair left out."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        names = sorted(set(found["pairs"][0]["metrics"]) - _PUBLISHED)
        self.kept = np.array([[row["kept"][name] for name in METHODS] for row in found["pairs"]])
        self.cases = [
            as_cases(
                [
                    (row["tasks"], [row["metrics"][name] for name in names], row["kept"][method])
                    for row in found["pairs"]
                ]
            )
            for method in METHODS
        ]

    def predicted(self, fit: Any) -> np.ndarray:
        """Return "pairs methods", each predicted from the other pairs."""
        result = np.zeros_like(self.kept)
        for pair in range(len(result)):
            others = np.arange(len(result)) != pair
            for number, cases in enumerate(self.cases):
                model: Predictor = fit(cases.only(others))
                result[pair, number] = model(cases.only(~others))[0]
        return result

    def lost_by_method(self, predicted: np.ndarray) -> float:
        """Return how much less the chosen method keeps than the best one, a mean over pairs, in points."""
        chosen = self.kept[np.arange(len(self.kept)), predicted.argmax(1)]
        return 100 * float((self.kept.max(1) - chosen).mean())

    def lost_by_partner(self, predicted: np.ndarray) -> float:
        """Return how much less a task's chosen partner keeps than the best one, over tasks and methods."""
        lost = []
        for has in self.cases[0].members.T.astype(bool):
            chosen = self.kept[has][predicted[has].argmax(0), np.arange(len(METHODS))]
            lost.append(self.kept[has].max(0) - chosen)
        return 100 * float(np.mean(lost))


def mean_of_others(cases: Cases) -> Predictor:
    """Predict the mean of the other pairs: the choice of a method without any prediction."""
    return lambda more: np.full(len(more.kept), cases.kept.mean())


def choices(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what each way of choosing loses, and what the models are worth."""
    history = History(found)
    by_tasks, by_metrics = history.predicted(additive), history.predicted(ridge)
    fixed = history.predicted(mean_of_others)
    agreement = np.tile(np.array([name == "agreement" for name in METHODS], float), (len(fixed), 1))
    worth = [[leave_tasks_out(cases, fit).r for cases in history.cases] for fit in (additive, ridge)]
    rest = [left_after_additive(cases) for cases in history.cases]
    return {
        "method": [history.lost_by_method(one) for one in (agreement, fixed, by_tasks, by_metrics)],
        "partner": [
            100 * float((_by_task(history).max(1) - _by_task(history).mean(1)).mean()),
            *(history.lost_by_partner(one) for one in (by_tasks, by_metrics)),
        ],
        "r": [_mean(values) for values in (*worth, rest)],
    }


def _by_task(history: History) -> np.ndarray:
    """Return "tasks partners methods"."""
    return np.array([history.kept[has] for has in history.cases[0].members.T.astype(bool)])


def _mean(values: Sequence[float | None]) -> float:
    return statistics.fmean(value for value in values if value is not None)


def table(families: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the page: a row for each family."""
    head = (
        "family", "kept", "always `agreement`", "best of others", "by tasks", "by metrics",
        "any partner", "by tasks", "by metrics", "r by tasks", "r by metrics", "r of the rest",
    )  # fmt: skip
    rows = []
    for found in families:
        own = choices(found)
        kept = 100 * float(History(found).kept.mean())
        points = [f"{value:.1f}" for value in (*own["method"], *own["partner"])]
        rows.append([found["family"], f"{kept:.1f} %", *points, *(f"{value:.2f}" for value in own["r"])])
    return page_table(head, rows)


def render() -> None:
    """Write the table into the page, in place of the one that is there."""
    found = table(json.loads(RESULTS.read_text(encoding="utf-8")))
    replace_tables(PAGE, r"\| family \|.*\n(\|.*\n)+", found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="*", help="families of checkpoints")
    parser.add_argument("--write", action="store_true", help="store the numbers, beside those of others")
    parser.add_argument("--render", action="store_true", help="write the table from the stored numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for folder in options.folders:
        found = measure(folder)
        print(table([found]))
        if options.write:
            stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
            stored = [row for row in stored if row["family"] != folder.name] + [found]
            write_text(RESULTS, json.dumps(sorted(stored, key=lambda row: str(row["family"]))) + "\n")
    if options.render:
        render()


if __name__ == "__main__":
    main()
