"""Operations that keep a part of each task vector, and add or average what is left of an element, in torch.

As in `ops`: every step is correctly rounded, and looks at one element of all tasks at a time.
"""

from __future__ import annotations

from jaxtyping import Float32, UInt8

from hub_magmax.kernels.lazy_imports import Rows, torch
from hub_magmax.kernels.sums import Weights, as_tensor, weighted_sum


def ties_merge(rows: Rows, thresholds: Weights, weights: Weights) -> Float32[torch.Tensor, " chunk"]:
    """Trim, elect a sign, and average the tasks that agree with it.

    Args:
        rows: One chunk of each task vector.
        thresholds: Elements below their task's threshold count as zero.
        weights: Weight of each task in the election and in the average.

    Source: TIES (arXiv:2306.01708), section 4, with weights.
    """
    return elected_mean(_trimmed(rows, thresholds), weights, weights)


def ties_sum(rows: Rows, thresholds: Weights, multipliers: Weights) -> Float32[torch.Tensor, " chunk"]:
    """Trim as `ties_merge`, and return the `elected_sum`."""
    return elected_sum(_trimmed(rows, thresholds), multipliers, multipliers)


def rescaled_ties(
    rows: Rows, thresholds: Weights, shares: Weights, weights: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Trim as `ties_merge`, and return the `elected_mean`; weights hold a rescaling, shares do not."""
    return elected_mean(_trimmed(rows, thresholds), weights, shares)


def _trimmed(rows: Rows, thresholds: Weights) -> list[torch.Tensor]:
    pairs = zip(rows, as_tensor(thresholds), strict=True)
    return [torch.where(row.abs() >= least, row, 0.0) for row, least in pairs]


def elected_mean(
    rows: Rows, weights: Weights, shares: Weights, ballots: Weights | None = None
) -> Float32[torch.Tensor, " chunk"]:
    """Return Σ w_t τ_t / Σ s_t over the tasks whose element has the sign of Σ b_t τ_t over all.

    Zero where that sum is zero.

    Args:
        rows: One chunk of each task vector.
        weights: The w_t.
        shares: The s_t; equal to the weights for a mean.
        ballots: The b_t; by default the weights.
    """
    elected = weighted_sum(rows, weights if ballots is None else ballots).sign()
    total = torch.zeros_like(elected)
    mass = torch.zeros_like(elected)
    for row, weight, share in zip(rows, as_tensor(weights), as_tensor(shares), strict=True):
        agrees = (row.sign() == elected) & (elected != 0)
        total = total + torch.where(agrees, row * weight, 0.0)
        mass = mass + torch.where(agrees, share, 0.0)
    return torch.where(mass > 0, total / mass, 0.0)


def elected_sum(rows: Rows, multipliers: Weights, rescaled: Weights) -> Float32[torch.Tensor, " chunk"]:
    """Return the sum of all r_t τ_t that have the sign of Σ m_t τ_t over all; zero where that sum is zero.

    A task of a negative multiplier is turned round before the election.

    Args:
        rows: One chunk of each task vector.
        multipliers: The m_t.
        rescaled: The r_t, of the same signs; equal to the multipliers where nothing was dropped.
    """
    elected = weighted_sum(rows, multipliers).sign()
    total = torch.zeros_like(elected)
    for row, multiplier in zip(rows, as_tensor(rescaled), strict=True):
        product = row * multiplier
        total = total + torch.where((product.sign() == elected) & (elected != 0), product, 0.0)
    return total


def banded_sum(
    rows: Rows, least: Weights, most: Weights, weights: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return Σ w_t τ_t over the elements whose magnitude is from `least` to `most` of their task."""
    return weighted_sum(_in_band(rows, least, most), weights)


def banded_ties(
    rows: Rows, least: Weights, most: Weights, weights: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return the `elected_mean` of what `banded_sum` adds."""
    return elected_mean(_in_band(rows, least, most), weights, weights)


def banded_ties_sum(
    rows: Rows, least: Weights, most: Weights, multipliers: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return the `elected_sum` of what `banded_sum` adds."""
    return elected_sum(_in_band(rows, least, most), multipliers, multipliers)


def _in_band(rows: Rows, least: Weights, most: Weights) -> list[torch.Tensor]:
    bounds = zip(rows, as_tensor(least), as_tensor(most), strict=True)
    return [torch.where((row.abs() >= low) & (row.abs() <= high), row, 0.0) for row, low, high in bounds]


def stitched(
    rows: Rows, thresholds: Weights, factors: Weights, weights: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return the weighted mean of the tasks that keep an element; what a single task keeps is taken whole.

    A task keeps what is not zero and not below its threshold, if it has a weight.

    Args:
        rows: One chunk of each task vector.
        thresholds: Of each task.
        factors: What the elements that a task alone keeps are multiplied by.
        weights: Of each task in the mean.

    Source: Localize-and-Stitch (arXiv:2408.13656), without data; RAM (arXiv:2601.13572).
    """
    alone, total, mass, count = (torch.zeros_like(rows[0]) for _ in range(4))
    numbers = zip(_trimmed(rows, thresholds), as_tensor(factors), as_tensor(weights), strict=True)
    for row, factor, weight in numbers:
        is_kept = (row != 0) & (weight != 0)
        alone = torch.where(is_kept, row * factor, alone)
        total = torch.where(is_kept, total + row * weight, total)
        mass = torch.where(is_kept, mass + weight, mass)
        count = torch.where(is_kept, count + 1.0, count)
    return torch.where(count > 1, total / mass, alone)


def clipped_sum(rows: Rows, limits: Weights, weights: Weights) -> Float32[torch.Tensor, " chunk"]:
    """Return Σ w_t τ_t with every magnitude above the limit of its task lowered to it."""
    bounds = zip(rows, as_tensor(limits), strict=True)
    clipped = [torch.where(row.abs() > limit, torch.copysign(limit, row), row) for row, limit in bounds]
    return weighted_sum(clipped, weights)


def dropped_sum(
    rows: Rows, kept: UInt8[torch.Tensor, "chunk bytes"], multipliers: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return Σ m_t τ_t over the tasks that keep the element; the m_t hold the rescaling."""
    return weighted_sum(_masked(rows, kept), multipliers)


def dropped_ties(
    rows: Rows, kept: UInt8[torch.Tensor, "chunk bytes"], shares: Weights, weights: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return the `elected_mean` over the tasks that keep the element; the shares hold the rescaling.

    Elements that were rescaled each by itself, and rounded, would no longer cancel where the masses of both
    signs are equal.
    """
    return elected_mean(_masked(rows, kept), weights, shares)


def dropped_ties_sum(
    rows: Rows, kept: UInt8[torch.Tensor, "chunk bytes"], rescaled: Weights, multipliers: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return the `elected_sum` over the tasks that keep the element."""
    return elected_sum(_masked(rows, kept), multipliers, rescaled)


def selected_ties(
    rows: Rows, kept: UInt8[torch.Tensor, "chunk bytes"], weights: Weights, ballots: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return the `elected_mean` over the elements that are kept; ballots elect, and weights average."""
    return elected_mean(_masked(rows, kept), weights, weights, ballots)


def scaled_sum(
    rows: Rows, factors: Float32[torch.Tensor, "chunk tasks"], multipliers: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return Σ m_t f_t τ_t, with a factor f_t for each element: 0 where a task does not keep it."""
    return weighted_sum(_scaled(rows, factors), multipliers)


def scaled_ties(
    rows: Rows, factors: Float32[torch.Tensor, "chunk tasks"], shares: Weights, weights: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return the `elected_mean` of the elements times their factors."""
    return elected_mean(_scaled(rows, factors), weights, shares)


def scaled_ties_sum(
    rows: Rows, factors: Float32[torch.Tensor, "chunk tasks"], multipliers: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return the `elected_sum` of the elements times their factors."""
    return elected_sum(_scaled(rows, factors), multipliers, multipliers)


def _scaled(rows: Rows, factors: Float32[torch.Tensor, "chunk tasks"]) -> list[torch.Tensor]:
    return [row * factors[:, task] for task, row in enumerate(rows)]


def _masked(rows: Rows, kept: UInt8[torch.Tensor, "chunk bytes"]) -> list[torch.Tensor]:
    is_kept = [(kept[:, task // 8] & (1 << task % 8)).bool() for task in range(len(rows))]
    return [torch.where(keep, row, 0.0) for keep, row in zip(is_kept, rows, strict=True)]
