"""Weights of the mixture of training samples that is nearest to a target sample.

The similarity of the target to each task alone says little about a task that makes up a fifth of it:
four fifths of the target are far from that task, whatever it is. Fitting all weights together
asks the right question, and is what recovers a known mixture. With μ_t the sample of task t and ν the
target sample, the weights minimise D(Σ_t w_t μ_t, ν) over the simplex, where D is the squared maximum
mean discrepancy or the Sinkhorn divergence, averaged over the feature spaces.

Around its minimum D is described by a gradient, a Hessian and the influence of each target example.
So the fit to a bootstrap resample is a small quadratic problem, exact for the discrepancy and to first
order for transport; the 200 fits of a bootstrap cost less than one transport.

Sources: Feydy et al., Interpolating between optimal transport and MMD using Sinkhorn divergences,
AISTATS 2019 (the divergence and its gradient); Iyer et al., Maximum mean discrepancy for class ratio
estimation, ICML 2014 (the discrepancy of a mixture).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from hub_magmax.preference.distance import (
    Features,
    Matrix,
    Shares,
    gaussian_kernel,
    median_squared_distance,
    squared_distances,
    uniform_shares,
    unit_size,
)

Weights = Float64[np.ndarray, " tasks"]

#: A transport needs some mass everywhere; so much does every task keep while it is being solved.
_LEAST_WEIGHT = 1e-5

#: How far the weights are moved to measure the curvature of a divergence that is no quadratic.
_STEP = 0.01


@dataclass(frozen=True)
class Space:
    """Both samples as one model sees them.

    Attributes:
        train: One sample of features per task.
        target: The target sample.
    """

    train: tuple[Features, ...]
    target: Features


def whiten(space: Space, shrinkage: float = 0.1) -> Space:
    """Return the space in coordinates in which examples of one task scatter alike in all directions.

    A distance there is a Mahalanobis distance under the covariance within tasks: directions in which
    the examples of every task differ anyway count less, those that tell tasks apart count more.

    Args:
        space: Both samples under one model.
        shrinkage: Share of the covariance that is replaced by its mean variance in every direction;
            keeps it invertible where there are more features than examples.

    Returns:
        The transformed space; unchanged where no task's examples differ at all.

    Source: Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices,
    2004, for the form of the shrinkage; the constant is ours.
    """
    scaled = unit_size(*space.train, space.target)
    train, target = scaled[:-1], scaled[-1]
    centred = np.concatenate([sample - sample.mean(axis=0) for sample in train])
    covariance = centred.T @ centred / len(centred)
    mean_variance = float(np.trace(covariance)) / len(covariance)
    if mean_variance <= 0:
        return space
    covariance = (1 - shrinkage) * covariance / mean_variance + shrinkage * np.eye(len(covariance))
    variances, directions = np.linalg.eigh(covariance)
    transform = directions / np.sqrt(variances)
    return Space(tuple(sample @ transform for sample in train), target @ transform)


def mixture_by_mmd(
    spaces: Sequence[Space], target_shares: Shares | None = None, *, bandwidth: float = 1.0
) -> Float64[np.ndarray, "draws tasks"]:
    """Return the weights with the least mean discrepancy, for each weighting of the target.

    Args:
        spaces: The samples under each model; at least two examples per task.
        target_shares: Weightings of the target sample, one per row; uniform by default.
        bandwidth: Of the Gaussian kernel, in units of the median squared distance.

    Returns:
        One row of weights per row of `target_shares`.
    """
    shares = _shares(spaces, target_shares)
    quadratic, cross = _mean_discrepancy(spaces, bandwidth)
    start = np.full(len(quadratic), 1.0 / len(quadratic))
    return np.array([_least_quadratic(quadratic, -cross @ share, start) for share in shares])


def mixture_by_transport(
    spaces: Sequence[Space], target_shares: Shares | None = None, *, regularisation: float = 0.1
) -> Float64[np.ndarray, "draws tasks"]:
    """Return the weights with the least Sinkhorn divergence, for each weighting of the target.

    The cost is the squared Euclidean distance divided by its maximum in the space. The divergence
    subtracts half of the transport from the mixture to itself; without it entropy pulls every
    weight towards the tasks in the middle. The first row of `target_shares` is fitted, the others to
    first order around it.

    Args:
        spaces: The samples under each model.
        target_shares: Weightings of the target sample, one per row, the first one positive everywhere;
            uniform by default.
        regularisation: Weight of the plan's entropy, in units of the cost.

    Returns:
        One row of weights per row of `target_shares`.
    """
    shares = _shares(spaces, target_shares)
    divergence = _divergence(spaces, regularisation, shares[0])
    num_tasks = len(spaces[0].train)
    best = _least(lambda weights: divergence(weights)[:2], np.full(num_tasks, 1.0 / num_tasks))
    if len(shares) == 1:
        return best[None]
    return np.vstack([best, _refits(divergence, best, shares[1:] - shares[0])])


def excess_by_mmd(spaces: Sequence[Space], weights: Weights, *, bandwidth: float = 1.0) -> Weights:
    """Return how far each task alone is from the target, less how far the mixture is: squared discrepancies.

    Args:
        spaces: As for `mixture_by_mmd`.
        weights: Of the mixture.
        bandwidth: As for `mixture_by_mmd`.
    """
    quadratic, cross = _mean_discrepancy(spaces, bandwidth)
    pull = 2 * cross @ _shares(spaces, None)[0]
    return np.asarray(np.diag(quadratic) - pull - (weights @ quadratic @ weights - pull @ weights))


def excess_by_transport(spaces: Sequence[Space], weights: Weights, *, regularisation: float = 0.1) -> Weights:
    """Return how far each task alone is from the target, less how far the mixture is: Sinkhorn divergences.

    Args:
        spaces: As for `mixture_by_transport`.
        weights: Of the mixture.
        regularisation: As for `mixture_by_transport`.
    """
    divergence = _divergence(spaces, regularisation, _shares(spaces, None)[0])
    of_mixture = divergence(weights)[0]
    return np.array([divergence(alone)[0] - of_mixture for alone in np.eye(len(weights))])


def _divergence(
    spaces: Sequence[Space], regularisation: float, share: Float64[np.ndarray, " target"]
) -> Callable[[Weights], tuple[float, Weights, Float64[np.ndarray, " target"]]]:
    """Return a function of weights: mean over the spaces of what `_transport_problem` returns."""
    problems = [_transport_problem(space, regularisation) for space in spaces]

    def divergence(weights: Weights) -> tuple[float, Weights, Float64[np.ndarray, " target"]]:
        found = [problem(weights, share) for problem in problems]
        return (
            float(np.mean([value for value, _, _ in found])),
            np.mean([gradient for _, gradient, _ in found], axis=0),
            np.mean([potential for _, _, potential in found], axis=0),
        )

    return divergence


def _mean_discrepancy(spaces: Sequence[Space], bandwidth: float) -> tuple[Matrix, Matrix]:
    parts = [_discrepancy(space, bandwidth) for space in spaces]
    return np.mean([inner for inner, _ in parts], axis=0), np.mean([cross for _, cross in parts], axis=0)


def _shares(spaces: Sequence[Space], target_shares: Shares | None) -> Shares:
    return uniform_shares(len(spaces[0].target)) if target_shares is None else target_shares


def _discrepancy(space: Space, bandwidth: float) -> tuple[Matrix, Matrix]:
    """Return the mean kernel between tasks, and between each task and each target example."""
    features, owner = _stacked(space)
    blocks = [squared_distances(features[0], other) for other in features]
    median = median_squared_distance(*blocks) * bandwidth
    inner, cross = (gaussian_kernel(block, median) for block in blocks)
    members = _membership(owner)
    sizes = members.sum(axis=1)
    sums = members @ inner @ members.T - np.diag(sizes)  # an example and itself are no pair
    within = sums / (np.outer(sizes, sizes) - np.diag(sizes))
    return np.asarray(within), np.asarray(members @ cross / sizes[:, None])


def _stacked(space: Space) -> tuple[tuple[Features, Features], Int64[np.ndarray, " rows"]]:
    """Return all training examples in one array, the target sample, and each example's task."""
    train, target = unit_size(np.concatenate(space.train), space.target)
    return (train, target), np.repeat(np.arange(len(space.train)), [len(sample) for sample in space.train])


def _membership(owner: Int64[np.ndarray, " rows"]) -> Matrix:
    return np.asarray(np.arange(owner.max() + 1)[:, None] == owner[None], dtype=np.float64)


def _transport_problem(space: Space, regularisation: float) -> Callable[..., tuple[float, Weights, Any]]:
    """Return a function of weights and target shares: divergence, its gradient, the target's potential."""
    features, owner = _stacked(space)
    inner, cross = (squared_distances(features[0], other) for other in features)
    largest = max(float(inner.max()), float(cross.max()))
    if largest > 0:
        inner, cross = inner / largest, cross / largest
    mean_of_task = _membership(owner)
    mean_of_task /= mean_of_task.sum(axis=1, keepdims=True)
    last: dict[str, Any] = {}  # where the previous solution ended: the next one is near

    def solve(weights: Weights, share: Float64[np.ndarray, " target"]) -> tuple[float, Weights, Any]:
        kept = np.maximum(weights, _LEAST_WEIGHT)
        mass = kept / kept.sum() @ mean_of_task
        to_target = _potentials(cross, mass, share, regularisation, last.get("target"))
        to_itself = _potentials(inner, mass, mass, regularisation, last.get("itself"))
        last.update(target=to_target, itself=to_itself)
        own = (to_itself[0] + to_itself[1]) / 2
        value = mass @ (to_target[0] - own) + share @ to_target[1]
        return float(value), mean_of_task @ (to_target[0] - own), to_target[1]

    return solve


def _potentials(
    cost: Matrix, rows: Any, columns: Any, regularisation: float, start: tuple[Any, Any] | None
) -> tuple[Any, Any]:
    """Return the dual potentials of an entropic transport, of rows and columns, up to a constant."""
    import ot

    scaled = None
    if start is not None:
        scaled = (start[0] / regularisation + np.log(rows), start[1] / regularisation + np.log(columns))
    _, log = ot.sinkhorn(
        rows,
        columns,
        cost,
        regularisation,
        method="sinkhorn_log" if regularisation < 0.02 else "sinkhorn",
        numItermax=2000,
        stopThr=1e-6,
        warn=False,
        log=True,
        warmstart=scaled,
    )
    u, v = (log["log_u"], log["log_v"]) if "log_u" in log else (np.log(log["u"]), np.log(log["v"]))
    return regularisation * (u - np.log(rows)), regularisation * (v - np.log(columns))


def _refits(divergence: Callable[..., Any], best: Weights, changes: Shares) -> Matrix:
    """Return the weights that fit when the target shares change, to first order around `best`.

    Moving from `best` towards w is Σ_t w_t (e_t − best), so curvature and influence are measured along
    these directions, which stay inside the simplex.
    """
    _, gradient, potential = divergence(best)
    directions = np.eye(len(best)) - best
    moved = [divergence(best + _STEP * direction) for direction in directions]
    curvature = np.array([directions @ (slope - gradient) / _STEP for _, slope, _ in moved])
    curvature = (curvature + curvature.T) / 2
    influence = np.array([(pull - potential) / _STEP for _, _, pull in moved])
    # At the minimum the slope is zero towards every task that has weight, and rises towards the others.
    # What is left of it is the solver's tolerance, which must not move the resamples.
    rising = np.where(best > _LEAST_WEIGHT, 0.0, np.maximum(directions @ gradient, 0.0))
    # Differences of finite steps are not exactly symmetric; around `best` they bias nothing.
    slopes = rising - curvature @ best + changes @ influence.T
    return np.array([_least_quadratic(curvature, slope, best) for slope in slopes])


def _least_quadratic(curvature: Matrix, slope: Weights, start: Weights) -> Weights:
    """Return the point of the simplex with the least ½ wᵀ curvature w + slopeᵀ w."""
    return _least(lambda w: (float(w @ curvature @ w / 2 + slope @ w), curvature @ w + slope), start)


def _least(function: Callable[[Weights], tuple[float, Weights]], start: Weights) -> Weights:
    """Return the point of the simplex where `function`, a value with its gradient, is least."""
    from scipy.optimize import minimize

    # The solver's tolerances are absolute: bring the slope at the start to the order of one.
    scale = 1.0 / max(float(np.ptp(function(start)[1])), 1e-9)

    def scaled(weights: Weights) -> tuple[float, Weights]:
        value, gradient = function(weights)
        return value * scale, gradient * scale

    ones = np.ones(len(start))
    found = minimize(
        scaled,
        start,
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * len(start),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1.0, "jac": lambda w: ones},
        options={"ftol": 1e-7, "maxiter": 100},
    )
    inside = np.clip(found.x, 0.0, None) if np.isfinite(found.x).all() else start
    return np.asarray(inside / inside.sum()) if inside.sum() > 0 else start
