"""Parameter competition (PCB-Merging, arXiv:2410.02396): scores of elements, and their balanced mean.

All of it is in float64, of steps that are rounded once each; the exponential function is a polynomial, so
that every backend and processor has the same bits.
"""

from __future__ import annotations

import math

from jaxtyping import Float32, Float64

from hub_magmax.kernels.lazy_imports import Rows, torch
from hub_magmax.kernels.sums import Weights, as_tensor

#: The logarithm of 2 in two parts, the first one short enough for its products with small integers to be
#: exact.
LOG2_HIGH, LOG2_LOW, LOG2_INVERSE = (
    0.693147180369123816490,
    1.90821492927058770002e-10,
    1.44269504088896338700,
)
#: Of (exp(r) - 1) / r, from the highest power of r down; r is at most half of the logarithm of 2.
COEFFICIENTS = tuple(1.0 / math.factorial(power) for power in range(14, 0, -1))
#: The hyperbolic tangent of more is 1 in float64.
MOST = 20.0


def _exponential(
    exponent: Float64[torch.Tensor, " chunk"],
) -> tuple[Float64[torch.Tensor, " chunk"], Float64[torch.Tensor, " chunk"]]:
    """Return 2**k and exp(r) - 1, of which exp(exponent) is made; the exponent is from -700 to 0."""
    power = (exponent * LOG2_INVERSE).round()
    rest = exponent - power * LOG2_HIGH - power * LOG2_LOW
    total = torch.full_like(rest, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        total = total * rest + coefficient
    return ((power.to(torch.int64) + 1023) << 52).view(torch.float64), total * rest


def exponential(exponent: Float64[torch.Tensor, " chunk"]) -> Float64[torch.Tensor, " chunk"]:
    """Return the exponential function of numbers from -700 to 0."""
    factor, change = _exponential(exponent)
    return (change + 1.0) * factor


def tangent(values: Float64[torch.Tensor, " chunk"]) -> Float64[torch.Tensor, " chunk"]:
    """Return the hyperbolic tangent."""
    size = torch.where(values < 0, 0.0 - values, values)
    factor, change = _exponential(torch.where(size > MOST, MOST, size) * -2.0)
    less = change * factor + (factor - 1.0)
    found = (0.0 - less) / (less + 2.0)
    return torch.where(values < 0, 0.0 - found, found)


def scores(
    rows: Rows, least: Weights, most: Weights, multipliers: Weights
) -> Float32[torch.Tensor, "tasks chunk"]:
    """Return how much each task claims an element: 0 where it opposes the sum of all.

    A score is exp(N (z² - 1)) · tanh(τ_t Σ m_s τ_s): z is the magnitude between the bounds of its task, from
    0 to 1, and N the number of tasks with a multiplier. The constant factor exp(-N) keeps scores small, and
    changes no comparison of them.

    Args:
        rows: One chunk of each task vector.
        least, most: Bounds of magnitudes.
        multipliers: In the sum; a task with 0 claims nothing.
    """
    bounds = as_tensor(least).double(), as_tensor(most).double(), as_tensor(multipliers)
    active = (bounds[2] != 0).sum().double()
    together = torch.zeros_like(rows[0], dtype=torch.float64)
    for row, multiplier in zip(rows, bounds[2], strict=True):
        together = torch.where(multiplier != 0, together + row.double() * multiplier.double(), together)
    return torch.stack([
        torch.where(multiplier != 0, _score(row.double(), low, high, together, active), 0.0)
        for row, low, high, multiplier in zip(rows, *bounds, strict=True)
    ])  # fmt: skip


def _score(
    wide: Float64[torch.Tensor, " chunk"],
    low: torch.Tensor,
    high: torch.Tensor,
    together: Float64[torch.Tensor, " chunk"],
    active: torch.Tensor,
) -> Float32[torch.Tensor, " chunk"]:
    place = torch.where(high > low, (_bounded(wide, low, high) - low) / (high - low), 0.0)
    found = exponential((place * place - 1.0) * active) * tangent(wide * together)
    return torch.where(found > 0, found, 0.0).float()


def _bounded(
    wide: Float64[torch.Tensor, " chunk"], low: torch.Tensor, high: torch.Tensor
) -> Float64[torch.Tensor, " chunk"]:
    """Return magnitudes, raised or lowered to the bounds."""
    size = torch.where(wide < 0, 0.0 - wide, wide)
    size = torch.where(size > high, high, size)
    return torch.where(size < low, low, size)


def balanced_mean(  # one row of numbers for each symbol of the formula
    rows: Rows,
    least: Weights,
    most: Weights,
    thresholds: Weights,
    tops: Weights,
    multipliers: Weights,
    weights: Weights,
) -> Float32[torch.Tensor, " chunk"]:
    """Return Σ w_t b_t c_t / Σ w_t b_t, zero where nobody claims the element.

    c_t is the element with its magnitude within the bounds, and b_t its score on the way from the threshold,
    0, to the largest score of its task, 1.

    Args:
        rows: One chunk of each task vector.
        least, most, multipliers: As for `scores`.
        thresholds, tops: A score of each task, below which nothing is claimed, and the largest one.
        weights: The w_t.
    """
    found = scores(rows, least, most, multipliers).double()
    numbers = [as_tensor(values).double() for values in (least, most, thresholds, tops, weights)]
    total = torch.zeros_like(rows[0], dtype=torch.float64)
    mass = torch.zeros_like(total)
    for row, score, low, high, threshold, top, weight in zip(rows, found, *numbers, strict=True):
        wide, above = row.double(), score - threshold
        share = torch.where(top > threshold, above / (top - threshold), 1.0)
        share = torch.where((above < 0) | (score == 0), 0.0, share) * weight
        size = torch.where(wide == 0, 0.0, _bounded(wide, low, high))
        total = total + torch.where(wide < 0, 0.0 - size, size) * share
        mass = mass + share
    return torch.where(mass > 0, total / mass, 0.0).float()
