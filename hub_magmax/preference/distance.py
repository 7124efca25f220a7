"""Distances between two samples of features, and the weights that distances become.

All of it is plain numpy in double precision. Every distance is unchanged when both samples are
multiplied by the same positive number, so features are brought to unit size first: nothing here
overflows, whatever the scale. A distance is computed for many weightings of the target sample at
once, one row of `target_shares` each; that is what bootstrap resamples are.

Source: Tunable MAGMAX (arXiv:2605.20803), data-based weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from hub_magmax.errors import EvaluationError, RecipeError

Features = Float64[np.ndarray, "_ features"]
Matrix = Float64[np.ndarray, "_ _"]
Train = Float64[np.ndarray, "train features"]
Target = Float64[np.ndarray, "target features"]
Shares = Float64[np.ndarray, "draws target"]

#: Below this, exp(-cost / regularisation) leaves the range of doubles and POT works with logarithms.
_PLAIN_REGULARISATION = 0.02

#: How far the marginals of a transport plan may be off before it counts as not converged.
_MARGINAL_TOLERANCE = 1e-3


def unit_size(*samples: Features) -> tuple[Features, ...]:
    """Return the samples divided by the largest absolute value in any of them.

    Raises:
        EvaluationError: If a sample is empty, or holds a NaN or an infinity.
    """
    if any(sample.size == 0 for sample in samples):
        raise EvaluationError("a sample of features is empty", where="preference")
    largest = max(float(np.abs(sample).max()) for sample in samples)
    if not np.isfinite(largest):
        raise EvaluationError(
            "the features hold a NaN or an infinity",
            where="preference",
            hint="A checkpoint is damaged, or its training diverged.",
        )
    return tuple(sample / largest if largest > 0 else sample for sample in samples)


def squared_distances(first: Features, second: Features) -> Matrix:
    """Return the squared Euclidean distance of every pair, from differences.

    The expansion |x|² − 2xy + |y|² would be faster, and lose all digits far from the origin.
    """
    from scipy.spatial.distance import cdist

    return np.asarray(cdist(first, second, "sqeuclidean"))


def uniform_shares(num_target: int) -> Shares:
    """Return the one weighting in which every target example counts the same."""
    return np.full((1, num_target), 1.0 / num_target)


def transport_cost(
    cost: Float64[np.ndarray, "rows target"],
    source_shares: Float64[np.ndarray, " rows"],
    target_shares: Shares,
    regularisation: float,
) -> Float64[np.ndarray, " draws"]:
    """Return ⟨P, cost⟩ of the entropic transport plan P to each weighting of the columns.

    Args:
        cost: Between 0 and 1.
        source_shares: Mass of each row, positive, summing to 1.
        target_shares: Mass of each column, one row per draw; each sums to 1.
        regularisation: Weight of the plan's entropy, in units of the cost.

    Returns:
        One number per draw. As `regularisation` falls, it falls to the exact transport cost.

    Raises:
        RecipeError: If the iterations do not converge.
    """
    import ot

    plain = regularisation >= _PLAIN_REGULARISATION
    with np.errstate(divide="ignore"):  # examples that a draw left out have the mass exp(-inf)
        found = [
            ot.sinkhorn(
                source_shares,
                # POT takes many weightings at once where it works without logarithms.
                part.T if plain else part[0],
                cost,
                regularisation,
                method="sinkhorn" if plain else "sinkhorn_log",
                numItermax=5000,
                warn=False,
                log=True,
            )
            for part in ([target_shares] if plain else np.split(target_shares, len(target_shares)))
        ]
    if max(log["err"][-1] for _, log in found) > _MARGINAL_TOLERANCE:
        raise RecipeError(
            f"the transport does not converge with regularisation {regularisation:g}",
            where="preference.transport.regularisation",
            expected="a larger number, such as 0.1",
        )
    if plain:
        return np.asarray(found[0][0])
    return np.array([float((plan * cost).sum()) for plan, _ in found])


def transport_distance(
    train: Train, target: Target, target_shares: Shares | None = None, *, regularisation: float = 0.1
) -> Float64[np.ndarray, " draws"]:
    """Return the cost of moving the training sample onto the target sample.

    The cost of a pair is its squared Euclidean distance divided by the largest one, so the result is
    between 0 and 1, and entropic transport (POT) solves the problem. Two samples that are the same
    have a small positive distance, because entropy spreads the plan.

    Args:
        train: At least one example.
        target: At least one example, with the same features.
        target_shares: Weightings of the target sample, one per row; uniform by default.
        regularisation: Weight of the plan's entropy, in units of the cost.

    Returns:
        One distance per row of `target_shares`.

    Source: Tunable MAGMAX (arXiv:2605.20803), transport-based weights.
    """
    cost = squared_distances(*unit_size(train, target))
    shares = uniform_shares(len(target)) if target_shares is None else target_shares
    if cost.max() > 0:
        cost = cost / cost.max()
    return transport_cost(cost, np.full(len(train), 1.0 / len(train)), shares, regularisation)


def gaussian_kernel(squared: Matrix, median: float) -> Matrix:
    """Return exp(−squared / (2 · median)), and 1 everywhere where the median is zero."""
    if median <= 0:
        return np.where(squared > 0, 0.0, 1.0)
    return np.asarray(np.exp(-squared / (2 * median)))


def median_squared_distance(*blocks: Matrix) -> float:
    """Return the median of the squared distances that are above zero; 0 where none is.

    Leaving out the zeros (an example and itself, copies) keeps the bandwidth positive in a sample that
    is mostly copies.
    """
    positive = np.concatenate([block[block > 0] for block in blocks])
    return float(np.median(positive)) if positive.size else 0.0


def mmd_distance(
    train: Train, target: Target, target_shares: Shares | None = None, *, bandwidth: float = 1.0
) -> Float64[np.ndarray, " draws"]:
    """Return the squared maximum mean discrepancy, by the unbiased estimate.

    The kernel is Gaussian; its variance is the median squared distance between examples, times
    `bandwidth`. Pairs of an example with itself do not count, in a weighted draw either: a copy that
    resampling made is not a second example. The estimate is negative where samples are as close as two
    samples of one distribution often are.

    Args:
        train: At least two examples.
        target: At least two examples, with the same features.
        target_shares: Weightings of the target sample, one per row; uniform by default.
        bandwidth: In units of the median.

    Returns:
        One distance per row of `target_shares`.

    The released code of Tunable MAGMAX gives other weights: it takes the square root of an estimate clamped
    at 0, and one bandwidth for the training sample and the pairs between the samples, another for the target
    sample, so that its three sums are of two kernels.

    Source: Gretton et al., A kernel two-sample test, JMLR 2012, equation 3.
    """
    train, target = unit_size(train, target)
    shares = uniform_shares(len(target)) if target_shares is None else target_shares
    within, between, outside = (
        squared_distances(*pair) for pair in ((train, train), (train, target), (target, target))
    )
    # Every pair counts in both directions, those between the samples too.
    median = median_squared_distance(within, between, between, outside) * bandwidth
    inner, cross, outer = (gaussian_kernel(block, median) for block in (within, between, outside))
    num_train = len(train)
    within_train = (inner.sum() - num_train) / (num_train * (num_train - 1))
    same = (shares**2).sum(axis=1)
    pairs = np.einsum("di,ij,dj->d", shares, outer, shares, optimize=True) - same
    # All mass on one example leaves no pair; its kernel with itself is 1.
    within_target = np.where(same < 1 - 1e-12, pairs / np.maximum(1 - same, 1e-12), 1.0)
    return np.asarray(within_train + within_target - 2 * shares @ cross.mean(axis=0))


def cosine_distance(
    train: Train, target: Target, target_shares: Shares | None = None
) -> Float64[np.ndarray, " draws"]:
    """Return 1 − cos of the angle between the centroids, from 0 to 2.

    A centroid at the origin has no direction: its distance is 1, and 0 to another one there.

    Args:
        train: At least one example.
        target: At least one example, with the same features.
        target_shares: Weightings of the target sample, one per row; uniform by default.

    Returns:
        One distance per row of `target_shares`.
    """
    train, target = unit_size(train, target)
    shares = uniform_shares(len(target)) if target_shares is None else target_shares
    own, others = _direction(train.mean(axis=0)[None]), _direction(shares @ target)
    # Half the squared distance of unit vectors: exact for equal ones, where 1 − cos would cancel.
    both_lengths = (own**2).sum(axis=1) + (others**2).sum(axis=1)
    apart = ((own - others) ** 2).sum(axis=1) / 2
    return np.asarray(np.where(both_lengths > 1.5, apart, both_lengths))


def _direction(vectors: Matrix) -> Matrix:
    """Return each row at length 1; rows that are zero stay zero."""
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    scaled = np.divide(vectors, largest, out=np.zeros_like(vectors), where=largest > 0)
    lengths = np.sqrt((scaled**2).sum(axis=1, keepdims=True))
    return np.asarray(np.divide(scaled, lengths, out=np.zeros_like(scaled), where=lengths > 0))


def similarity(distances: Float64[np.ndarray, " tasks"], temperature: float) -> Float64[np.ndarray, " tasks"]:
    """Return exp(−distance / temperature); far away it is zero."""
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(np.exp(-distances / temperature))


def weights_from_distances(
    distances: Matrix | Sequence[Sequence[float]], temperature: float
) -> Float64[np.ndarray, "draws tasks"]:
    """Return each row's similarities divided by their sum, computed in the log domain.

    exp(−distance / temperature) of every task may underflow to zero; its logarithm does not. Equal
    distances get equal weights, and the nearest task always a positive one.

    Args:
        distances: One row per draw, one column per task; finite.
        temperature: Positive; the published values are 1/100, and 1/50 for cosine.

    Returns:
        Weights of the same shape; each row sums to 1.
    """
    values = np.asarray(distances, dtype=np.float64)
    with np.errstate(over="ignore", under="ignore"):
        logarithms = -(values - values.min(axis=1, keepdims=True)) / temperature
        masses = np.exp(logarithms)
    return np.asarray(masses / masses.sum(axis=1, keepdims=True))
