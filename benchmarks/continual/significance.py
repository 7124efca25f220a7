"""Paired tests whose unit is the training seed: intervals, p-values, effect sizes, Holm's correction.

Seeds are independent of each other; the targets of a seed share its checkpoints. Where every seed has the
same number of targets, the mixed model with a random effect of the seed, y = μ + s + e, estimates μ by the
mean of the seeds' means, and its test of μ = 0 is Student's t over those means with one degree of freedom
less than there are seeds. So there is no need to fit it: each function here takes one difference per seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

#: Of the intervals.
CONFIDENCE = 0.95

_NUM_QUANTILES = 1000


@dataclass(frozen=True)
class Paired:
    """Test of the mean of paired differences against zero.

    Attributes:
        difference: Mean over seeds, in the unit of the values.
        interval: Of Student's t at `CONFIDENCE`; None for a single seed.
        p: Two-sided; None where `t_test_p` has none.
        effect: Cohen's d of paired values, the mean over the standard deviation of the differences; None
            where that is zero or unknown.
        effect_interval: By the noncentral t distribution, at the same confidence.
        num_seeds: Number of differences.
    """

    difference: float
    interval: tuple[float, float] | None
    p: float | None
    effect: float | None
    effect_interval: tuple[float, float] | None
    num_seeds: int

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON has them."""
        return asdict(self)


def paired(differences: Sequence[float]) -> Paired:
    """Test whether differences, one for each seed, have the mean zero."""
    from scipy.stats import t

    num, mean = len(differences), math.fsum(differences) / len(differences)
    if num < 2:
        return Paired(mean, None, None, None, None, num)
    deviation = float(np.std(differences, ddof=1)) if len(set(differences)) > 1 else 0.0
    half = float(t.ppf((1 + CONFIDENCE) / 2, num - 1)) * deviation / math.sqrt(num)
    effect = mean / deviation if deviation else None
    around = None if effect is None else effect_interval(effect, num)
    return Paired(mean, (mean - half, mean + half), t_test_p(differences), effect, around, num)


def t_test_p(differences: Sequence[float]) -> float | None:
    """Return the two-sided p-value of Student's t; 1 where nothing differs.

    None where nothing can be decided: for a single value, and for values that are all the same but not zero,
    whose standard error of zero says nothing about how they spread.
    """
    from scipy.stats import ttest_1samp

    if len(differences) < 2:
        return None
    if len(set(differences)) == 1:
        return None if differences[0] else 1.0
    return float(ttest_1samp(differences, 0.0).pvalue)


def wilcoxon_p(differences: np.ndarray) -> float:
    """Return the two-sided p-value of Wilcoxon's signed ranks; 1 where nothing differs."""
    from scipy.stats import wilcoxon

    if not np.any(differences):
        return 1.0
    return float(wilcoxon(differences, zero_method="zsplit", method="approx").pvalue)


def effect_interval(effect: float, num_seeds: int) -> tuple[float, float]:
    """Return the interval of Cohen's d of paired values.

    Its bounds are the noncentralities under which the observed t is a quantile of the noncentral t
    distribution, divided by the root of the number of seeds. The distribution is averaged over quantiles of
    the standard deviation, since scipy's has no value for some large noncentralities.
    """
    from scipy.optimize import brentq
    from scipy.special import ndtr

    root = math.sqrt(num_seeds)
    scaled = effect * root * _deviations(num_seeds - 1)
    lowest, highest = float(scaled.min()) - 10, float(scaled.max()) + 10

    def bound(quantile: float) -> float:
        return float(brentq(lambda shift: ndtr(scaled - shift).mean() - quantile, lowest, highest)) / root

    return bound((1 + CONFIDENCE) / 2), bound((1 - CONFIDENCE) / 2)


@cache
def _deviations(freedom: int) -> np.ndarray:
    """Return quantiles, at equal steps, of a sample's standard deviation over the true one."""
    from scipy.stats import chi2

    shares = (np.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES
    found: np.ndarray = np.sqrt(chi2.ppf(shares, freedom) / freedom)
    return found


def holm(p_values: Sequence[float], num_tests: int | None = None) -> list[float]:
    """Return p-values corrected by Holm's step-down rule, in the order given.

    Args:
        p_values: Of the tests that could be made.
        num_tests: All tests of the family, those without a p-value too; by default those given.
    """
    total = len(p_values) if num_tests is None else num_tests
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (total - rank) * p_values[index]))
        corrected[index] = highest
    return corrected
