"""Confidence intervals of measured numbers, and paired comparisons of two models.

Draws depend on a seed and the number of examples alone, so a table is the same every time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from hub_magmax.errors import EvaluationError

#: Resamples behind a bootstrap interval.
NUM_RESAMPLES = 2000

#: Numbers of the resamples that are looked at together, and that are drawn at a time: as many as fit the
#: processor's caches, four times as fast as more.
DRAWS_AT_ONCE, _PIECE = 1 << 18, 1 << 16

#: Percentiles of the resamples between which a 95 % interval lies.
PERCENTILES = (2.5, 97.5)


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share, within [0, 1] and around the share.

    Args:
        successes: From 0 to `trials`; no whole number where outcomes are means over seeds.
        trials: At least 1.

    Source: Newcombe (Statistics in Medicine 17, 1998), method 3.
    """
    from scipy.special import ndtri

    z, share = float(ndtri(0.975)), successes / trials
    width = 2 * (trials + z**2)
    centre = (2 * trials * share + z**2) / width
    half = z / width * math.sqrt(4 * trials * share * (1 - share) + z**2)
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == trials else centre + half


def mean_interval(values: Sequence[float], *, is_share: bool) -> tuple[float, float]:
    """Return the 95 % interval of the mean of independent values.

    Args:
        values: At least one; at least two unless they are shares.
        is_share: They are right or wrong answers, or their means over seeds: Wilson. Otherwise Student's t.

    Raises:
        EvaluationError: If a single value says nothing about how they spread.
    """
    if is_share:
        return wilson_interval(math.fsum(values), len(values))
    if len(values) < 2:
        raise EvaluationError("one example says nothing about how examples differ", expected="at least 2")
    from scipy.stats import t

    mean = math.fsum(values) / len(values)
    half = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def bootstrap_means(
    values: Float64[np.ndarray, " examples"],
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
    draws_at_once: int = DRAWS_AT_ONCE,
) -> Float64[np.ndarray, " resamples"]:
    """Return the means of samples drawn from the values with replacement, each as large as the original."""
    blocks = resampled_ranks(len(values), seed, num_resamples, draws_at_once)
    return np.concatenate([values[drawn].mean(axis=1) for drawn in blocks])


def resampled_ranks(
    size: int, seed: int, num_resamples: int = NUM_RESAMPLES, draws_at_once: int = DRAWS_AT_ONCE
) -> Iterator[Int64[np.ndarray, "resamples examples"]]:
    """Yield the indices that resamples with replacement draw, as many resamples at a time as fit."""
    # Its raw stream is the same in every version of numpy, and torch need not be loaded for it.
    generator = np.random.PCG64(seed)
    at_once = max(1, draws_at_once // size)
    for first in range(0, num_resamples, at_once):
        count = min(at_once, num_resamples - first)
        found = np.empty(count * size, np.int64)
        for start in range(0, len(found), min(_PIECE, draws_at_once)):
            piece = found[start : start + min(_PIECE, draws_at_once)]
            piece[:] = _uniform(generator, len(piece)) * size
        yield found.reshape(count, size)


def uniform_draws(count: int, seed: int) -> Float64[np.ndarray, " draws"]:
    """Return numbers drawn evenly from [0, 1), multiples of 2**-53."""
    return _uniform(np.random.PCG64(seed), count)


def _uniform(generator: np.random.PCG64, count: int) -> Float64[np.ndarray, " draws"]:
    return (generator.random_raw(count) >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True)
class Difference:
    """Mean difference of two models' scores on the same examples, with interval and p-value.

    Attributes:
        mean: Of the differences.
        low, high: 95 % bootstrap interval over the examples.
        p_value: Of no difference, two-sided: McNemar's exact test for right and wrong answers,
            Wilcoxon's signed ranks for other scores.
        num_examples: How many examples both saw.
        gained, lost: On how many the first scored higher, and lower; None where scores are means over seeds.
    """

    mean: float
    low: float
    high: float
    p_value: float
    num_examples: int
    gained: int | None
    lost: int | None

    @property
    def is_identical(self) -> bool:
        """Whether both models scored the same on every example."""
        return self.gained == self.lost == 0


def paired_difference(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Difference:
    """Compare two models example by example.

    Args:
        first, second: Scores of the same examples in the same order; at least one.
        seed: Of the bootstrap.

    Raises:
        ValueError: If their numbers differ.
    """
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    mean = float(differences.mean())
    low, high = np.percentile(bootstrap_means(differences, seed), PERCENTILES)
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    return Difference(
        mean,
        min(float(low), mean),
        max(float(high), mean),
        _p_value(differences, gained, lost),
        len(differences),
        gained,
        lost,
    )


def _p_value(differences: Float64[np.ndarray, " examples"], gained: int, lost: int) -> float:
    if gained + lost == 0:
        return 1.0
    from scipy.stats import binomtest, wilcoxon

    if np.isin(differences, (-1.0, 0.0, 1.0)).all():
        return float(binomtest(gained, gained + lost).pvalue)
    return float(wilcoxon(differences, zero_method="zsplit", method="approx").pvalue)
