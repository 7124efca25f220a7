"""Risk–coverage and cost–quality curves, and the area under the former."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

Values = Float64[np.ndarray, " examples"]


def summed_from_the_top(scores: Values, values: Values) -> Float64[np.ndarray, " counts"]:
    """Return the sums of the values of the 0, 1, …, n examples with the highest scores.

    Examples with equal scores come in random order, of which the sums are the expectation.
    """
    order = np.argsort(-scores, kind="stable")
    _, groups, sizes = np.unique(-scores[order], return_inverse=True, return_counts=True)
    means = np.bincount(groups, weights=values[order]) / sizes
    return np.concatenate([[0.0], np.cumsum(means[groups])])


def risk_coverage(trust: Values, errors: Values) -> Values:
    """Return the share of errors among the 1, 2, …, n examples that are trusted most.

    Args:
        trust: Higher means more likely right.
        errors: 1 where the answer is wrong, else 0.

    Source: El-Yaniv and Wiener, On the Foundations of Noise-free Selective Classification, JMLR 2010.
    """
    return summed_from_the_top(trust, errors)[1:] / np.arange(1, len(errors) + 1)


def area_under_risk_coverage(trust: Values, errors: Values) -> float:
    """Return the mean of `risk_coverage` over all coverages (AURC); lower is better.

    Source: Geifman, Uziel and El-Yaniv, Bias-Reduced Uncertainty Estimation, ICLR 2019 (arXiv:1805.08206).
    """
    return float(risk_coverage(trust, errors).mean())


def cost_quality(gain: Values, kept: Values, escalated: Values) -> Float64[np.ndarray, " counts"]:
    """Return the share of right answers when the 0, 1, …, n examples with the largest gain are escalated.

    Args:
        gain: By which examples are chosen.
        kept: 1 where the merged model is right, else 0.
        escalated: The same of the model that an example is escalated to.
    """
    found: np.ndarray = (kept.sum() + summed_from_the_top(gain, escalated - kept)) / len(kept)
    return found


def at_share(curve: Float64[np.ndarray, " counts"], share: float) -> float:
    """Return the value of a `cost_quality` curve where a share of the examples is escalated."""
    return float(curve[round(share * (len(curve) - 1))])
