"""Two models of how much a merge keeps: effects of its tasks that add up, and ridge regression on metrics.

Both are fitted in closed form and have no seed. What they are worth is measured by leaving every task out in
turn, as the paper does, and the metrics' share by what they tell of the rest that additive effects leave.

Source: arXiv:2601.22285, whose regression maximises Pearson's r by gradient steps from a random start; its
result depends on that start, and ridge regression on the same scaled metrics predicts better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

#: Penalty of the squared coefficients, of metrics that are scaled to -1 … 1.
PENALTY = 1.0

#: Merges and tasks that a model is fitted on at least: all pairs of four tasks.
FEWEST_CASES, FEWEST_TASKS = 6, 4

#: Cases of a fold of which a correlation is told at least.
_FEWEST_OF_FOLD = 3

#: Groups in which cases are left out to see what metrics tell of the rest.
_NUM_FOLDS = 10


class Cases(NamedTuple):
    """Finished merges of one method, of equally many tasks each.

    Attributes:
        tasks: Names of all tasks.
        members: Whether each task takes part, "cases tasks".
        metrics: Of each merge, means over its pairs of tasks, "cases metrics".
        kept: Of each merge, the mean share of its tasks' own scores that it keeps.
    """

    tasks: tuple[str, ...]
    members: np.ndarray
    metrics: np.ndarray
    kept: np.ndarray

    def only(self, chosen: np.ndarray) -> Cases:
        """Return the cases of a mask."""
        return Cases(self.tasks, self.members[chosen], self.metrics[chosen], self.kept[chosen])

    def with_tasks(self, more: Iterable[str]) -> Cases:
        """Return the cases with tasks that take part in none."""
        tasks = (*self.tasks, *more)
        nothing = np.zeros((len(self.kept), len(tasks) - len(self.tasks)))
        return self._replace(tasks=tasks, members=np.hstack([self.members, nothing]))


#: Predicts what further cases keep; fitted on some.
Predictor = Callable[[Cases], np.ndarray]


def additive(cases: Cases) -> Predictor:
    """Return the mean, and an effect of each task, by least squares; a task that was not seen has none."""
    shares = _shares(cases)
    middle, mean = shares.mean(0), float(cases.kept.mean())
    effects = np.linalg.lstsq(shares - middle, cases.kept - mean, rcond=1e-9)[0]
    return lambda more: np.asarray(mean + (_shares(more) - middle) @ effects)


def _shares(cases: Cases) -> np.ndarray:
    return np.asarray(cases.members / cases.members.sum(1, keepdims=True))


def ridge(cases: Cases, penalty: float = PENALTY) -> Predictor:
    """Return a linear function of the metrics, each scaled to -1 … 1 over these cases."""
    scale = _Scale(cases.metrics)
    scaled, mean = scale(cases.metrics), float(cases.kept.mean())
    weights = np.linalg.solve(
        scaled.T @ scaled + penalty * np.eye(scaled.shape[1]), scaled.T @ (cases.kept - mean)
    )
    return lambda more: np.asarray(mean + scale(more.metrics) @ weights)


class _Scale:
    """Scales metrics to -1 … 1 over some cases, less their means there; what is the same in all is 0."""

    def __init__(self, metrics: np.ndarray) -> None:
        self._low, self._width = metrics.min(0), np.ptp(metrics, axis=0)
        self._mean = np.zeros(metrics.shape[1])
        self._mean = self(metrics).mean(0)

    def __call__(self, metrics: np.ndarray) -> np.ndarray:
        width = np.where(self._width > 0, self._width, np.inf)
        return np.asarray(2 * (metrics - self._low) / width - self._mean)


def leverages(cases: Cases, more: Cases) -> tuple[float, np.ndarray]:
    """Return how far metrics lie from those of `cases`: the most of any of these, and of each of `more`.

    A linear model extrapolates where the leverage is larger than that of every case it was fitted on.
    """
    scale = _Scale(cases.metrics)
    scaled, others = scale(cases.metrics), scale(more.metrics)
    inverse = np.linalg.inv(scaled.T @ scaled + PENALTY * np.eye(scaled.shape[1]))
    own = np.einsum("ij,jk,ik->i", scaled, inverse, scaled)
    return float(own.max()), np.einsum("ij,jk,ik->i", others, inverse, others)


@dataclass(frozen=True)
class Worth:
    """How well a model predicts merges with a task that it has not seen.

    Attributes:
        r: Pearson's, the mean over the tasks left out; None where no fold has enough cases that differ.
        error: Mean absolute error over all cases left out.
    """

    r: float | None
    error: float


def leave_tasks_out(cases: Cases, fit: Callable[[Cases], Predictor]) -> Worth:
    """Return what a model is worth for a new task: fitted without each task, on the merges that have it."""
    correlations, errors = list[float](), list[np.ndarray]()
    for has in cases.members.T.astype(bool):
        if has.any() and not has.all():
            predicted, kept = fit(cases.only(~has))(cases.only(has)), cases.kept[has]
            errors.append(np.abs(predicted - kept))
            if (found := correlation(predicted, kept)) is not None:
                correlations.append(found)
    r = float(np.mean(correlations)) if correlations else None
    return Worth(r, float(np.mean(np.concatenate(errors))))


def left_after_additive(cases: Cases) -> float | None:
    """Return Pearson's r of what additive effects leave and of what metrics say of it, for cases left out.

    A tenth of the cases is left out at a time, or two where they are fewer than twenty.
    """
    rest = cases._replace(kept=cases.kept - additive(cases)(cases))
    fold = np.random.default_rng(0).permutation(len(rest.kept)) % min(_NUM_FOLDS, len(rest.kept) // 2)
    predicted = np.zeros(len(rest.kept))
    for number in range(fold.max() + 1):
        predicted[fold == number] = ridge(rest.only(fold != number))(rest.only(fold == number))
    return correlation(predicted, rest.kept)


def correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return Pearson's r; None of fewer than three values, or where one side does not differ."""
    a, b = one - one.mean(), other - other.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if len(a) >= _FEWEST_OF_FOLD and size > 1e-12 else None


def as_cases(merges: Sequence[tuple[Sequence[str], Sequence[float], float]]) -> Cases:
    """Return cases of (tasks, metrics, kept)."""
    tasks = tuple(sorted({task for members, _, _ in merges for task in members}))
    members = np.array([[task in own for task in tasks] for own, _, _ in merges], np.float64)
    metrics = np.array([metrics for _, metrics, _ in merges], np.float64)
    return Cases(tasks, members, metrics, np.array([kept for _, _, kept in merges], np.float64))
