"""Thresholds for a stated risk, with a bound that holds for any distribution of the examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool


@dataclass(frozen=True)
class AtThreshold:
    """A threshold on held-out examples.

    Attributes:
        threshold: Examples are escalated whose gain is above it.
        escalated, errors: On how many examples this is so, and the router's answer is wrong.
        bound: Upper confidence bound of the share of wrong answers.
    """

    threshold: float
    escalated: int
    errors: int
    bound: float


def upper_bound(errors: int, trials: int, confidence: float) -> float:
    """Return the one-sided upper bound of a share that is exact for every n: Clopper and Pearson (1934).

    Independent trials with a share of errors above it give so few errors with a probability of at most
    1 - `confidence`.
    """
    if errors >= trials:
        return 1.0
    from scipy.stats import beta

    return float(beta.ppf(confidence, errors + 1, trials - errors))


def at_thresholds(
    thresholds: Sequence[float],
    gain: np.ndarray,
    kept: Bool[np.ndarray, " examples"],
    escalated: Bool[np.ndarray, " examples"],
    confidence: float,
) -> list[AtThreshold]:
    """Return what each threshold does on held-out examples, which had no part in its choice.

    Args:
        thresholds: In the order in which they are tested.
        gain: Of each example.
        kept, escalated: Whether the merged model, and the checkpoint that an example goes to, is right.
        confidence: Of each bound by itself.
    """
    found = []
    for threshold in thresholds:
        goes = gain > threshold
        errors = int((~np.where(goes, escalated, kept)).sum())
        found.append(
            AtThreshold(threshold, int(goes.sum()), errors, upper_bound(errors, len(gain), confidence))
        )
    return found


def supported(tested: Sequence[AtThreshold], risk: float) -> AtThreshold | None:
    """Return the last threshold up to which all bounds are within a risk; None where the first is not.

    This is fixed-sequence testing: the order is known before the examples are seen, and the first failure
    ends it. With a probability of at least the bounds' confidence, the risk of the returned threshold is as
    stated, without a correction for the number of thresholds.

    Source: Bauer, Multiple testing in clinical trials (1991); for risks Angelopoulos et al., Learn then Test
    (arXiv:2110.01052), section 2.
    """
    last = None
    for one in tested:
        if one.bound > risk:
            break
        last = one
    return last
