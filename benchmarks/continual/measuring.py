"""Scores of every method on every target of a family, example by example."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.continual.estimating import Estimator, Weights
from benchmarks.continual.protocol import Protocol, draw_subsets, draw_targets
from benchmarks.continual.scoring import Scorer
from benchmarks.continual.sources import Family
from hub_magmax import methods
from hub_magmax.analysis.tuning import Trial
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.preference.explicit import KINDS, normalise
from hub_magmax.recipe.loading import parse_recipe, updated
from hub_magmax.recipe.matching import locked_method
from hub_magmax.recipe.preferences import Schedule
from hub_magmax.recipe.schema import Method, Recipe

AVERAGE = Method(name="average")
AGREEMENT = Method(name="agreement")
MAGMAX = Method(name="magmax")
TUNABLE = Method.model_validate({"name": "tunable_magmax", "selection": "algorithm-1"})
#: First attempt of a comparison, as `method: auto` makes it.
FIRST = Method(name="auto")
TOP_N = Method.model_validate({"name": "tunable_magmax", "selection": "top-n"})


#: Methods of two models; targets mix more.
OF_TWO = ("slerp", "nuslerp")


def tried_methods() -> list[Method]:
    """Return every registered method with its defaults, and the second selection of Tunable MAGMAX.

    Those `OF_TWO` models are left out, and those that need statistics of the tasks' data.
    """
    names = [name for name in methods.method_names() if name not in OF_TWO]
    return [*(Method(name=name) for name in names if methods.get_method(name).statistics is None), TOP_N]


def with_statistics(family: Family) -> list[Method]:
    """Return every method that needs statistics of the tasks' data, where there are examples for them."""
    names = methods.method_names() if family.statistics else ()
    return [Method(name=name) for name in names if methods.get_method(name).statistics is not None]


def with_correction(family: Family) -> list[Method]:
    """Return the methods that are tried with a correction besides, where there are examples for it."""
    return [AVERAGE] if family.statistics else []


def uses_preference(method: Method) -> bool:
    """Say whether weights change what the method does."""
    return methods.get_method(method.name).uses_preference


def is_tried(family: Family, method: Method, kind: str, *, corrected: bool = False) -> bool:
    """Say whether a method is merged under a kind of preference."""
    if corrected and family.transported is not None:
        return kind == "uniform"
    if kind.endswith("published"):
        return bool(locked_method(method) == locked_method(TUNABLE))
    if kind == "transport" and family.transported is not None and method.name not in family.transported:
        return False
    return kind == "uniform" or uses_preference(method)


@dataclass(frozen=True)
class Row:
    """One method under one kind of preference.

    Attributes:
        label: The method.
        kind: The preference; `uniform` for methods that ignore it.
        trials: For each target, one trial per scaling coefficient, with an outcome for each of its rows.
    """

    label: str
    kind: str
    trials: tuple[tuple[Trial, ...], ...]


@dataclass(frozen=True)
class Encoded:
    """Examples in batches, short texts first, since a batch is padded to its longest text.

    Attributes:
        batches: As the evaluator takes them.
        places: Of each example in them.
    """

    batches: Sequence[Any]
    places: np.ndarray


class Bench(AbstractContextManager["Bench"]):
    """A family's checkpoints and test examples, ready to merge and score.

    Args:
        family: What is measured.
        protocol: How.
    """

    def __init__(self, family: Family, protocol: Protocol) -> None:
        self.family, self.protocol = family, protocol
        self.num_tasks = len(family.tasks)
        self.targets = draw_targets(family.owners, protocol, family.seed)
        self.estimator = Estimator(family)
        self._scorer = Scorer(recipe_of(family), family.statistics)
        self._all = self._encode(range(len(family.owners)))
        self._by_target = [self._encode(target.rows) for target in self.targets]

    def __exit__(self, *exception: object) -> None:
        self._scorer.__exit__(*exception)

    def _encode(self, rows: Iterable[int]) -> Encoded:
        chosen, columns = self.family.test.select(rows), self.family.columns
        name = columns.input_column or ("text" if "text" in chosen.column_names else None)
        values = chosen[name][:] if name else []
        lengths = [len(value) if isinstance(value, str) else 0 for value in values] or [0] * len(chosen)
        order = np.argsort(lengths, kind="stable")
        return Encoded(self._scorer.encode(chosen.select(order), columns), np.argsort(order, kind="stable"))

    @property
    def uniform(self) -> Weights:
        return (1 / self.num_tasks,) * self.num_tasks

    def base_model(self) -> tuple[Outcome, ...]:
        """Return the base model's outcomes on all test examples."""
        method = Method(name="last_task")
        trial = next(self._scorer.trials(method, (0.0,), self.uniform, self._all.batches))
        return picked(trial, self._all.places).outcomes

    def references(self) -> dict[str, list[float]]:
        """Return scores of all test examples under what merging is compared with.

        `own checkpoint` is that of the task of each example, which has to be known; `joint training` the
        checkpoint that was learned from all tasks together.
        """
        found: dict[str, list[float]] = {"own checkpoint": [0.0] * len(self.family.owners)}
        single = Method(name="single_task")
        for task in range(self.num_tasks):
            weights = tuple(float(one == task) for one in range(self.num_tasks))
            trial = next(self._scorer.trials(single, (1.0,), weights, self._all.batches))
            outcomes = picked(trial, self._all.places.tolist()).outcomes
            for row in _rows_of(self, (task,)):
                found["own checkpoint"][row] = outcomes[row].score
        if self.family.joint is not None:
            joint = self._scorer.outcomes_of(self.family.joint, self._all.batches)
            found["joint training"] = [joint[place].score for place in self._all.places]
        return found

    def fixed(self, method: Method, weights: Weights, target: int | None = None) -> Trial:
        """Return the trial at the protocol's fixed coefficient, on all test examples or a target's."""
        encoded = self._all if target is None else self._by_target[target]
        trial = next(self._scorer.trials(method, (self.protocol.fixed,), weights, encoded.batches))
        return picked(trial, encoded.places)

    def row(self, method: Method, kind: str, weights: Sequence[Weights], *, corrected: bool = False) -> Row:
        """Return what a method does to every target, given each one's weights; equal ones are merged once."""
        found: dict[int, tuple[Trial, ...]] = {}
        for shared in dict.fromkeys(weights):
            members = [number for number, own in enumerate(weights) if own == shared]
            found |= zip(members, self._shared(method, shared, members, corrected=corrected), strict=True)
        trials = tuple(found[number] for number in range(len(weights)))
        return Row(trials[0][0].candidate.label, kind, trials)

    def _shared(
        self, method: Method, weights: Weights, members: Sequence[int], *, corrected: bool
    ) -> Iterator[tuple[Trial, ...]]:
        """Yield the trials of each target that shares the weights.

        They are cut from trials on all test examples, or on the targets' own, whichever are fewer.
        """
        sizes = [len(self.targets[number].rows) for number in members]
        whole = sum(sizes) > len(self.family.owners)
        encoded = [self._all] if whole else [self._by_target[number] for number in members]
        batches = [batch for part in encoded for batch in part.batches]
        scalings = self.protocol.scalings
        trials = list(self._scorer.trials(method, scalings, weights, batches, corrected=corrected))
        for number, size, end in zip(members, sizes, np.cumsum(sizes).tolist(), strict=True):
            own = self._by_target[number].places
            places = self._all.places[[*self.targets[number].rows]] if whole else own + end - size
            yield tuple(picked(trial, places.tolist()) for trial in trials)


def recipe_of(family: Family) -> Recipe:
    """Return a recipe of the family's checkpoints and evaluator, without examples."""
    evaluation = {"evaluator": dict(family.evaluator), "tasks": {}, "batch_size": 256}
    if family.recipe is not None:
        aside = dict.fromkeys(("preference", "compare", "sweep"))
        return updated(family.recipe, {**aside, "method": "average", "evaluation": evaluation})
    values = {
        "schema": 1,
        "base_model": str(family.base_model.absolute()),
        "tasks": [{"name": task, "model": str(place.absolute())} for task, place in family.tasks.items()],
        "tensors": [{"match": glob, "take": "base_model"} for glob in family.unlearned],
        "evaluation": evaluation,
    }
    return parse_recipe(values)


def picked(trial: Trial, rows: Iterable[int]) -> Trial:
    """Return a trial with some of its outcomes."""
    return Trial(trial.candidate, tuple(trial.outcomes[row] for row in rows))


def mean_score(outcomes: Sequence[Outcome]) -> float:
    """Return the mean score."""
    return sum(outcome.score for outcome in outcomes) / len(outcomes)


def schedules(bench: Bench, tried: Sequence[Method]) -> list[dict[str, Any]]:
    """Return the accuracy of the first and the last task under geometric schedules."""
    tasks, found = list(bench.family.tasks), []
    first, last = (_rows_of(bench, (task,)) for task in (0, bench.num_tasks - 1))
    for method in tried:
        for ratio in bench.protocol.ratios:
            weights = normalise(KINDS["geometric"](Schedule(ratio=ratio), tasks))
            trial = bench.fixed(method, weights)
            scores = {name: picked(trial, rows).value for name, rows in (("first", first), ("last", last))}
            found.append({"method": trial.candidate.label, "ratio": ratio} | scores)
    return found


def _rows_of(bench: Bench, tasks: tuple[int, ...]) -> list[int]:
    return np.flatnonzero(np.isin(bench.family.owners, tasks)).tolist()


def numbers_of_tasks(bench: Bench, tried: Sequence[Method]) -> list[dict[str, Any]]:
    """Return the accuracy on all test examples of 1, 2, … tasks, each weighing the same, others nothing.

    Methods that ignore the preference are merged once.
    """
    subsets = draw_subsets(bench.num_tasks, bench.protocol, bench.family.seed)
    found = []
    for method in tried:
        ignoring = None if uses_preference(method) else bench.fixed(method, bench.uniform)
        for subset in subsets:
            weights = normalise([1 / len(subset) if t in subset else 0.0 for t in range(bench.num_tasks)])
            trial = ignoring or bench.fixed(method, weights)
            score = picked(trial, _rows_of(bench, subset)).value
            found.append({"method": trial.candidate.label, "tasks": list(subset), "score": score})
    return found


def sample_sizes(bench: Bench, tried: Sequence[Method], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Return how far estimates from few target examples are off, and what merging by them scores.

    The samples of a target are nested, and scored on what the largest one leaves.
    """
    protocol, found = bench.protocol, []
    for number, target in enumerate(bench.targets):
        largest = protocol.sizes[-1] * len(target.tasks)
        if number % protocol.draws >= protocol.size_draws or largest >= len(target.rows):
            continue
        shares = np.array(target.shares(bench.num_tasks))
        for kind in kinds:
            for size in protocol.sizes:
                sample = target.rows[: size * len(target.tasks)]
                weights = bench.estimator.weights(kind, target, sample)
                error = float(np.abs(np.array(weights) - shares).sum())
                row = {"target": number, "kind": kind, "size": size, "error": error}
                found.append(row | _scores(bench, tried, weights, number, largest))
    return found


def _scores(
    bench: Bench, tried: Sequence[Method], weights: Weights, target: int, first: int
) -> Mapping[str, Any]:
    trials = [bench.fixed(method, weights, target) for method in tried]
    return {"scores": {t.candidate.label: mean_score(t.outcomes[first:]) for t in trials}}
