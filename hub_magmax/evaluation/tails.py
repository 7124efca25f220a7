"""Tails of per-example losses: CVaR, flipped answers and the worst examples of one model against another.

The loss of an example is how much less the second model makes of it than the first: the probability of
the right answer before minus after, where the evaluator tells it, or else the score before minus after.
CVaR at a level such as 0.95 is the mean loss of the worst 5 % of the examples.

Source: Rockafellar and Uryasev, "Conditional value-at-risk for general loss distributions", Journal of
Banking & Finance 26 (2002), definition 3 with proposition 8 for samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from hub_magmax.evaluation.intervals import (
    PERCENTILES,
    Difference,
    paired_difference,
    resampled_ranks,
    wilson_interval,
)
from hub_magmax.evaluation.scores import Score

#: CVaR is told at these levels.
LEVELS = (0.90, 0.95, 0.99)

#: Fewer examples than this in a tail say nothing about it.
MIN_TAIL_EXAMPLES = 5

#: Examples that are named.
NUM_WORST = 3

_Values = Float64[np.ndarray, " examples"]


@dataclass(frozen=True)
class Tail:
    """CVaR at one level, with its 95 % interval (bootstrap-t)."""

    level: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Worst:
    """One example: its number in the data from 0, and each model's score or probability."""

    index: int
    before: float
    after: float


@dataclass(frozen=True)
class ExampleLoss:
    """Losses of a model against another, example by example.

    Attributes:
        task: Whose examples.
        difference: Of the scores: the model minus the one before.
        tails: By level; without those in which fewer than `MIN_TAIL_EXAMPLES` examples lie.
        right_before: Examples that the one before had right; None where scores are not right or wrong.
        flipped: How many of these are wrong now.
        flip_interval: 95 % interval (Wilson) of their share; None if there were none to flip.
        worst: The examples of the largest loss, largest first; those that lost nothing are left out.
        in_probability: Losses are measured in the probability of the right answer.
    """

    task: str
    difference: Difference
    tails: tuple[Tail, ...]
    right_before: int | None
    flipped: int | None
    flip_interval: tuple[float, float] | None
    worst: tuple[Worst, ...]
    in_probability: bool

    def tail(self, level: float) -> Tail | None:
        return next((tail for tail in self.tails if tail.level == level), None)

    @property
    def flip_rate(self) -> float | None:
        """Share of right answers that became wrong."""
        return self.flipped / self.right_before if self.flipped is not None and self.right_before else None


def example_loss(before: Score | None, after: Score | None) -> ExampleLoss | None:
    """Compare two models' single examples of one task; None unless both models' outcomes were kept."""
    if not before or not after or not before.outcomes or len(before.outcomes) != len(after.outcomes):
        return None
    first, second = _compared(before, after)
    losses, bounds = losses_of(before, after)
    return ExampleLoss(
        before.task,
        paired_difference(after.outcomes, before.outcomes),
        tails(losses, bounds=bounds),
        *_flips(before.outcomes, after.outcomes),
        _worst(first, second),
        in_probability=bool(before.probabilities and after.probabilities),
    )


def losses_of(before: Score, after: Score) -> tuple[_Values, tuple[float, float] | None]:
    """Return the loss of each example, and the ends of its scale, if there are any."""
    first, second = _compared(before, after)
    in_probability = bool(before.probabilities and after.probabilities)
    return first - second, (-1, 1) if in_probability or _are_shares(first, second) else None


def _compared(before: Score, after: Score) -> tuple[_Values, _Values]:
    """Return the probabilities of the right answers where both have them, else the scores."""
    if before.probabilities and after.probabilities:
        return np.asarray(before.probabilities, np.float64), np.asarray(after.probabilities, np.float64)
    return np.asarray(before.outcomes, np.float64), np.asarray(after.outcomes, np.float64)


def _are_shares(*scores: _Values) -> bool:
    return all(values.min() >= 0 and values.max() <= 1 for values in scores)


def _flips(
    before: Sequence[float], after: Sequence[float]
) -> tuple[int | None, int | None, tuple[float, float] | None]:
    """Return how many were right before, how many of these are wrong after, and the interval of the share."""
    if not {*before, *after} <= {0.0, 1.0}:
        return None, None, None
    right = [second for first, second in zip(before, after, strict=True) if first == 1.0]
    flipped = right.count(0.0)
    return len(right), flipped, wilson_interval(flipped, len(right)) if right else None


def _worst(before: _Values, after: _Values) -> tuple[Worst, ...]:
    losses = before - after
    order = np.argsort(-losses, kind="stable")[:NUM_WORST]
    return tuple(Worst(int(i), float(before[i]), float(after[i])) for i in order if losses[i] > 0)


def tails(
    values: _Values,
    levels: Sequence[float] = LEVELS,
    *,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
) -> tuple[Tail, ...]:
    """Return CVaR at each level that has examples enough, with 95 % bootstrap-t intervals.

    A percentile interval of a CVaR is too narrow (it covers 75 to 92 % where ten examples lie in the
    tail): resamples repeat the few largest values and never go beyond. The t statistic, whose spread is
    estimated in each resample anew, corrects this.

    Args:
        values: Independent losses.
        levels: Each at least 0 and below 1.
        bounds: Between which all losses lie, and therefore the intervals; None for none.
        seed: Of the bootstrap.
    """
    (found,) = tails_of_each([values], levels, bounds=bounds, seed=seed)
    return found


def tails_of_each(
    samples: Sequence[_Values],
    levels: Sequence[float] = LEVELS,
    *,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
) -> list[tuple[Tail, ...]]:
    """Return the `tails` of several samples of one size, for which resamples are drawn once."""
    size = len(samples[0])
    wanted = [level for level in levels if _num_in_tail(size, level) >= MIN_TAIL_EXAMPLES]
    if not wanted:
        return [()] * len(samples)
    studies = [_Study(np.sort(values)[::-1], wanted) for values in samples]
    most = math.ceil(_num_in_tail(size, min(wanted)))
    for ranks in resampled_ranks(size, seed):
        largest = np.sort(np.partition(ranks, most - 1, axis=1)[:, :most], axis=1)
        for study in studies:
            study.add(largest)
    return [study.tails(bounds or (-math.inf, math.inf)) for study in studies]


class _Study:
    """The t statistics of the CVaR of one sample at some levels, gathered from resamples.

    Args:
        ordered: The sample, falling.
        levels: Of the CVaR.
    """

    def __init__(self, ordered: _Values, levels: Sequence[float]) -> None:
        self._ordered = ordered
        self._found = {level: cvar_estimates(ordered[None], level, len(ordered)) for level in levels}
        self._ratios: dict[float, list[np.ndarray]] = {level: [] for level in levels}

    def add(self, ranks: Int64[np.ndarray, "resamples largest"]) -> None:
        """Take in resamples by the ranks of their largest values, ascending."""
        resampled = self._ordered[ranks]
        for level, (value, error) in self._found.items():
            means, errors = cvar_estimates(resampled, level, len(self._ordered))
            # A resample without spread has no statistic; a small part of the error stands in for its own.
            self._ratios[level].append((means - value) / np.maximum(errors, 0.05 * error + 1e-300))

    def tails(self, limits: tuple[float, float]) -> tuple[Tail, ...]:
        return tuple(
            _tail(level, found, np.concatenate(self._ratios[level]), limits)
            for level, found in self._found.items()
        )


def _tail(
    level: float,
    found: tuple[np.ndarray, np.ndarray],
    ratios: np.ndarray,
    limits: tuple[float, float],
) -> Tail:
    value, error = (float(part[0]) for part in found)
    if error == 0:
        return Tail(level, value, value, value)
    low, high = (float(part) for part in np.percentile(ratios, PERCENTILES))
    below, above = min(value - high * error, value), max(value - low * error, value)
    return Tail(level, value, max(below, limits[0]), min(above, limits[1]))


def _num_in_tail(size: int, level: float) -> float:
    return round((1 - level) * size, 9)


def cvar_estimates(
    ordered: Float64[np.ndarray, "samples largest"], level: float, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the CVaR and its standard error of samples of a size.

    Args:
        ordered: The largest values of each sample, which fall along the rows; at least those in the tail.
        level: At least 0 and below 1.
        size: Of each sample.

    The error is that of the mean of the excess over the quantile, which is what CVaR's influence
    function leaves of each value (Trindade et al., Journal of Banking & Finance 31 (2007)).
    """
    inside = _num_in_tail(size, level)
    whole = math.ceil(inside)
    shares = np.clip(inside - np.arange(whole), 0, 1)
    top = ordered[:, :whole]
    means = top @ shares / inside
    excess = top - top[:, -1:]
    sums, squares = excess.sum(axis=1), (excess**2).sum(axis=1)
    variance = np.maximum(squares - sums**2 / size, 0) / max(size - 1, 1)
    return means, np.sqrt(variance / size) * size / inside
