"""Fits of the generalized Pareto distribution to excesses over a threshold, many samples at a time.

The distribution has P(Y > y) = (1 + shape y / scale)^(-1 / shape) for excesses y > 0: exponential at shape 0,
heavier above, and with an end at scale / |shape| below. Its likelihood is maximal where the likelihood in one
number, shape / scale, is; the shape follows from it.

Source: Grimshaw, "Computing maximum likelihood estimates for the generalized Pareto distribution",
Technometrics 35 (1993); Pickands, Annals of Statistics 3 (1975), for excesses over high thresholds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from hub_magmax.evaluation.intervals import uniform_draws

#: The likelihood grows without bound below this shape, so the search ends here.
LEAST_SHAPE = -1.0

#: The largest excess is looked at, in the logarithm of 1 + shape / scale times it, between these ends.
_ENDS, _NUM_STARTS, _NUM_STEPS = (-14.0, 14.0), 33, 45
_GOLDEN = (5**0.5 - 1) / 2

_Samples = Float64[np.ndarray, "samples excesses"]
_Each = Float64[np.ndarray, " samples"]


@dataclass(frozen=True)
class ParetoFits:
    """Fits to samples, one per row.

    Attributes:
        shape: At least `LEAST_SHAPE`; maximum likelihood is regular above -0.5.
        scale: In the unit of the excesses, above 0.
    """

    shape: _Each
    scale: _Each

    def survival(self, excesses: _Samples) -> _Samples:
        """Return P(Y > y) of each excess, by the fit of its row."""
        shape, scale = self.shape[:, None], self.scale[:, None]
        inside = np.maximum(shape * excesses / scale, -1 + 1e-15)
        with np.errstate(divide="ignore", invalid="ignore"):
            power = np.where(np.abs(shape) < _NEARLY_ZERO, excesses / scale, np.log1p(inside) / shape)
        found: _Samples = np.exp(-power)
        return found

    def draw(self, num_excesses: int, seed: int) -> _Samples:
        """Return samples of the fitted distributions, a row for each."""
        logs = -np.log1p(-uniform_draws(len(self.shape) * num_excesses, seed))
        logs = logs.reshape(len(self.shape), num_excesses)
        shape, scale = self.shape[:, None], self.scale[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = np.where(np.abs(shape) < _NEARLY_ZERO, logs, np.expm1(shape * logs) / shape)
        found: _Samples = scale * drawn
        return found


#: Shapes this near to 0 are computed as the exponential distribution.
_NEARLY_ZERO = 1e-9


def fit_pareto(excesses: _Samples) -> ParetoFits:
    """Return the fits of maximum likelihood, at shapes of at least `LEAST_SHAPE`.

    Args:
        excesses: Above 0, at least two per row, not all the same.
    """
    means = excesses.mean(axis=1, keepdims=True)
    samples = excesses / means
    largest = samples.max(axis=1)

    def look(position: _Each) -> tuple[_Each, _Each, _Each]:
        """Return the mean logarithmic likelihood, the shape and the scale at a place of the search."""
        ratio = np.expm1(position) / largest
        shape = np.log1p(ratio[:, None] * samples).mean(axis=1)
        is_flat = np.abs(ratio) < _NEARLY_ZERO
        scale = np.where(is_flat, 1.0, shape / np.where(is_flat, 1.0, ratio))
        likelihood = np.where(shape < LEAST_SHAPE, -np.inf, -np.log(scale) - shape - 1)
        return likelihood, shape, scale

    starts = np.linspace(*_ENDS, _NUM_STARTS)
    found = np.stack([look(np.full(len(samples), start))[0] for start in starts])
    best = np.clip(found.argmax(axis=0), 1, _NUM_STARTS - 2)
    position = _maximize(lambda at: look(at)[0], starts[best - 1], starts[best + 1])
    _, shape, scale = look(position)
    return ParetoFits(np.maximum(shape, LEAST_SHAPE), scale * means[:, 0])


def _maximize(function: Callable[[_Each], _Each], low: _Each, high: _Each) -> _Each:
    """Return where a function is largest between two places, row by row, by golden sections."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(_NUM_STEPS):
        goes_left = at_left >= at_right
        low, high = np.where(goes_left, low, left), np.where(goes_left, right, high)
        new = np.where(goes_left, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        at_new = function(new)
        left, right = np.where(goes_left, new, right), np.where(goes_left, left, new)
        at_left, at_right = np.where(goes_left, at_new, at_right), np.where(goes_left, at_left, at_new)
    middle: _Each = (low + high) / 2
    return middle


def anderson_darling(excesses: _Samples, fits: ParetoFits) -> _Each:
    """Return the statistic of Anderson and Darling of each row against its fit; larger is farther."""
    ordered = np.sort(excesses, axis=1)
    above = np.clip(fits.survival(ordered), 1e-300, 1 - 1e-16)
    size = ordered.shape[1]
    weights = (2 * np.arange(1, size + 1) - 1) / size
    found: _Each = -size - (np.log1p(-above) + np.log(above[:, ::-1])) @ weights
    return found


def goodness_of_fit(excesses: Float64[np.ndarray, " excesses"], num_samples: int, seed: int) -> float:
    """Return the p-value of the fit: how often samples drawn from it lie as far from a fit of their own.

    Both numbers of the distribution are fitted anew to every drawn sample (a parametric bootstrap); tables
    of the statistic for known numbers would pass too much.

    Args:
        excesses: Above 0, at least two, not all the same.
        num_samples: How many are drawn; the smallest p-value is 1 / (num_samples + 1).
        seed: Of the draws.
    """
    fit = fit_pareto(excesses[None])
    seen = anderson_darling(excesses[None], fit)[0]
    drawn = ParetoFits(np.repeat(fit.shape, num_samples), np.repeat(fit.scale, num_samples)).draw(
        len(excesses), seed
    )
    as_far = anderson_darling(drawn, fit_pareto(drawn)) >= seen
    return float((1 + as_far.sum()) / (num_samples + 1))
