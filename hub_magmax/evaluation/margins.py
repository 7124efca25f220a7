"""Normalised margins: the quality of a model on few examples, for choosing between models.

Right and wrong answers to a few dozen examples say little. Margins say more, but models that are merged
with larger coefficients are surer of all their answers, right or wrong, so that probabilities favour them:
choosing by the mean probability of the right answer cost 12 to 22 points of accuracy on the digits, choosing
by accuracy 2 to 3. A margin divided by the model's own mean margin is free of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from hub_magmax.evaluation.evaluators import Outcome

Margins = Float64[np.ndarray, " examples"]


def normalised_margins(outcomes: Sequence[Outcome]) -> Margins:
    """Return one number per example, higher where the model does better.

    Where the model gives margins, tanh of the margin in units of its mean size: from −1, surely wrong, to 1,
    surely right. Otherwise the scores.
    """
    margins = np.array([math.nan if o.margin is None else o.margin for o in outcomes])
    if np.isnan(margins).any():
        return np.array([outcome.score for outcome in outcomes])
    size = np.abs(margins).mean()
    return np.tanh(margins / size) if size > 0 else np.zeros(len(margins))


def within(best: Margins, other: Margins, errors: float) -> bool:
    """Say whether `other` is worse than `best` by no more than `errors` standard errors of the difference.

    Both are of the same examples. One example says nothing about errors: then `other` may not be worse.
    """
    difference = best - other
    count = len(difference)
    error = difference.std(ddof=1) / math.sqrt(count) if count > 1 else 0.0
    return bool(difference.mean() <= errors * error + 1e-12)
