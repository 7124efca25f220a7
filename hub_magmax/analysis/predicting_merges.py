"""Predictions of how much merges keep, by two models side by side, each with what it is worth."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from hub_magmax.analysis.merge_history import FinishedMerge, MergeHistory, base_of, mean_metrics, tasks_of
from hub_magmax.analysis.mergeability import (
    FEWEST_CASES,
    FEWEST_TASKS,
    Cases,
    Worth,
    additive,
    as_cases,
    leave_tasks_out,
    left_after_additive,
    leverages,
    ridge,
)
from hub_magmax.evaluation.tables import Format, Table, Tabular
from hub_magmax.files import read_result
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.reporting.pair_metrics import PairMetrics
from hub_magmax.text import number_of

#: File of predictions, beside the recipe or its merged model.
PREDICTIONS_NAME = "predictions.json"


@dataclass(frozen=True)
class Told:
    """A prediction, or why there is none."""

    kept: float | None
    refusal: str = ""


@dataclass(frozen=True)
class Prediction:
    """What a method would keep of some tasks.

    Attributes:
        tasks: A pair, or all.
        method: As the history has it.
        measured: What the merge itself kept, where it is in the history.
        by_tasks, by_metrics: Predicted by additive effects of the tasks, and by ridge regression on metrics.
    """

    tasks: tuple[str, ...]
    method: str
    measured: float | None
    by_tasks: Told
    by_metrics: Told


@dataclass(frozen=True)
class Footing:
    """What the predictions of a method stand on: merges of so many tasks, and what the models are worth.

    Attributes:
        by_tasks, by_metrics: For a task that was left out; None where there are too few merges.
        rest_r: Correlation of the metrics' prediction with what additive effects leave.
    """

    method: str
    num_tasks: int
    num_merges: int
    by_tasks: Worth | None
    by_metrics: Worth | None
    rest_r: float | None


@dataclass(frozen=True, repr=False)
class MergePredictions(Tabular):
    """Predictions for every pair of a recipe's tasks and for all of them, by method.

    Attributes:
        predictions: Pair by pair, then all.
        footing: Of the methods.
        left_out: Merges of the history that tell nothing, by what is the matter with them.
    """

    predictions: tuple[Prediction, ...]
    footing: tuple[Footing, ...]
    left_out: Mapping[str, int]

    def as_table(self) -> Table:
        """Return a row for each prediction; what is refused is empty, and the reasons are told below."""
        rows = tuple(
            (
                " and ".join(found.tasks) if len(found.tasks) == 2 else f"all {len(found.tasks)}",
                found.method,
                found.measured,
                found.by_tasks.kept,
                found.by_metrics.kept,
            )
            for found in self.predictions
        )
        return Table(("tasks", "method", "measured", "by tasks", "by metrics"), rows, (*self._notes(),))

    def footings(self) -> Table:
        """Return a row for each method: what its predictions stand on, and what they are worth."""
        head = (
            "method",
            "tasks",
            "merges",
            "r by tasks",
            "error",
            "r by metrics",
            "its error",
            "r of the rest",
        )
        rows = tuple(
            (
                found.method,
                found.num_tasks,
                found.num_merges,
                *_worth(found.by_tasks),
                *_worth(found.by_metrics),
                found.rest_r,
            )
            for found in self.footing
        )
        return Table(
            head, rows, ("For a task left out of the fit; the rest is what effects of tasks leave.",)
        )

    def table(self, form: Format = "text") -> str:
        """Return predictions, and but in CSV the table of what they are worth below."""
        if form == "csv":
            return self.as_table().write(form)
        return f"{self.as_table().write(form)}\n\n{self.footings().write(form)}"

    def _repr_html_(self) -> str:
        """Return predictions and what they are worth, as notebooks show them."""
        return self.as_table()._repr_html_() + self.footings()._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    def _notes(self) -> Iterator[str]:
        yield "Shares of the own checkpoints' scores that are kept, the mean over the tasks."
        for name, kind in (("by tasks", "by_tasks"), ("by metrics", "by_metrics")):
            reasons = [getattr(found, kind).refusal for found in self.predictions]
            for reason in dict.fromkeys(filter(None, reasons)):
                yield f"Refused {name}, {reasons.count(reason)} of {len(reasons)}: {reason}."
        for reason, count in self.left_out.items():
            yield f"Left out of the history: {number_of(count, 'merge')} {reason}."


def _worth(found: Worth | None) -> tuple[float | None, float | None]:
    return (found.r, found.error) if found else (None, None)


def read_predictions(path: Path) -> MergePredictions:
    """Return the predictions stored in `path`.

    Raises:
        OutputError: If it holds something else.
    """
    return read_result(path, MergePredictions, "a prediction", "Run `hub-magmax predict-merge` again.")


def predict_merges(lock: Lock, history: MergeHistory, metrics: PairMetrics | None) -> MergePredictions:
    """Predict what each method of a history keeps of every pair of tasks, and of all of them.

    Args:
        lock: Names the tasks and their base model.
        history: Finished merges; those of another base model tell nothing.
        metrics: Of the pairs of tasks; None predicts by tasks alone. Those of merges that were measured with
            another rank or number of examples are not fitted.
    """
    base = base_of(lock)
    merges = [merge for merge in history.merges if merge.base_model == base]
    left_out = Counter(history.left_out)
    left_out["of another base model"] += len(history.merges) - len(merges)
    if metrics:
        alike = f"--rank {metrics.rank} --examples {metrics.num_examples}"
        merges, num_odd = _measured_alike(merges, metrics)
        left_out[f"from the fit by metrics, as theirs are not of {alike}"] += num_odd
    names = list(lock.tasks)
    wanted = [*combinations(names, 2), *([tuple(names)] if len(names) > 2 else [])]
    models = {size: _methods(merges, size, lock, metrics) for size in dict.fromkeys(map(len, wanted))}
    predictions = [found for tasks in wanted for found in _predicted(tasks, models[len(tasks)])]
    footing = tuple(model.footing(size) for size, found in models.items() for model in found)
    return MergePredictions(tuple(predictions), footing, dict(+left_out))


def _measured_alike(merges: Iterable[FinishedMerge], metrics: PairMetrics) -> tuple[list[FinishedMerge], int]:
    """Return merges without metrics that do not compare with these, and how many had such."""
    found = [(merge, not merge.metrics or merge.compares(metrics)) for merge in merges]
    kept = [merge if is_fit else replace(merge, metrics={}) for merge, is_fit in found]
    return kept, sum(not is_fit for _, is_fit in found)


def _methods(
    merges: Iterable[FinishedMerge], size: int, lock: Lock, metrics: PairMetrics | None
) -> list[_Method]:
    """Return the models of every method, by name, that merged as many tasks."""
    groups: dict[str, list[FinishedMerge]] = {}
    for merge in merges:
        if len(merge.tasks) == size:
            groups.setdefault(merge.method, []).append(merge)
    known = dict(zip(lock.tasks, tasks_of(lock), strict=True))
    return [_Method(group, known, metrics) for _, group in sorted(groups.items())]


def _predicted(tasks: tuple[str, ...], models: Sequence[_Method]) -> list[Prediction]:
    nothing = Told(None, f"no merge of {len(tasks)} tasks is in the history")
    return [model.predict(tasks) for model in models] or [Prediction(tasks, "any", None, nothing, nothing)]


class _Method:
    """Both models of a method, fitted on merges of equally many tasks."""

    def __init__(
        self, merges: Sequence[FinishedMerge], known: Mapping[str, str], metrics: PairMetrics | None
    ) -> None:
        self._method, self._known, self._measured = merges[0].method, known, metrics
        self._kept = {frozenset(merge.tasks): merge.kept for merge in merges}
        self._all = as_cases([(merge.tasks, (), merge.kept) for merge in merges])
        told = [merge for merge in merges if merge.metrics]
        self._shared = _shared(told, mean_metrics(metrics, [*known])) if metrics and told else []
        self._some = as_cases([(m.tasks, [m.metrics[name] for name in self._shared], m.kept) for m in told])

    def footing(self, size: int) -> Footing:
        enough, enough_metrics = not _too_few(self._all), not self._lacking()
        return Footing(
            self._method,
            size,
            len(self._all.kept),
            leave_tasks_out(self._all, additive) if enough else None,
            leave_tasks_out(self._some, ridge) if enough_metrics else None,
            left_after_additive(self._some) if enough_metrics else None,
        )

    def predict(self, tasks: tuple[str, ...]) -> Prediction:
        known = [self._known[task] for task in tasks]
        measured = self._kept.get(frozenset(known))
        return Prediction(tasks, self._method, measured, self._by_tasks(known), self._by_metrics(tasks))

    def _by_tasks(self, known: Sequence[str]) -> Told:
        if reason := _too_few(self._all):
            return Told(None, reason)
        if not {*known} & {*self._all.tasks}:
            return Told(None, "none of the tasks is in the history")
        cases = self._all.with_tasks(task for task in known if task not in self._all.tasks)
        member = np.array([[task in known for task in cases.tasks]], np.float64)
        return Told(float(additive(cases)(Cases(cases.tasks, member, np.zeros((1, 0)), np.zeros(1)))[0]))

    def _by_metrics(self, tasks: Sequence[str]) -> Told:
        if reason := self._lacking():
            return Told(None, reason)
        assert self._measured is not None
        found = mean_metrics(self._measured, [*self._known], tasks)
        row = np.array([[found[name] for name in self._shared]])
        case = Cases(self._some.tasks, np.zeros((1, len(self._some.tasks))), row, np.zeros(1))
        most, (leverage,) = leverages(self._some, case)
        if leverage > most:
            return Told(None, f"metrics beyond those of the history ({self._farthest(row[0])})")
        return Told(float(ridge(self._some)(case)[0]))

    def _lacking(self) -> str:
        if not self._shared:
            return "no metrics measured alike: diagnose the merges with --metrics, into their folders"
        return _too_few(self._some)

    def _farthest(self, row: np.ndarray) -> str:
        """Return the metric that lies farthest outside of the history's, with its value and theirs."""
        low, high = self._some.metrics.min(0), self._some.metrics.max(0)
        width = np.where(high > low, high - low, np.inf)
        place = int((np.maximum(low - row, row - high) / width).argmax())
        return f"{self._shared[place]} is {row[place]:.3g}, there {low[place]:.3g} to {high[place]:.3g}"


def _shared(merges: Iterable[FinishedMerge], own: Iterable[str]) -> list[str]:
    """Return the metrics that all merges have, of some names."""
    return [name for name in own if all(name in merge.metrics for merge in merges)]


def _too_few(cases: Cases) -> str:
    """Say why a model is not fitted; nothing where it is."""
    num_sets = len(np.unique(cases.members, axis=0))
    if num_sets >= FEWEST_CASES and len(cases.tasks) >= FEWEST_TASKS:
        return ""
    return (
        f"the history has {number_of(num_sets, 'set')} of {number_of(len(cases.tasks), 'task')}, and "
        f"{FEWEST_CASES} of {FEWEST_TASKS} are needed at least"
    )
