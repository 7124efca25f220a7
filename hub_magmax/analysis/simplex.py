"""Designs over the preference simplex: weights to try, in order.

A fixed walk lists its weights; the adaptive one looks at what was measured so far. It models each score
over the simplex as a Gaussian process and tries next where the front is expected to grow most, so its
evaluations gather near the front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Float64

from hub_magmax.reporting.pareto import covered, front

Weights = Float64[np.ndarray, "points tasks"]
Values = Float64[np.ndarray, "points scores"]

#: Weights that the adaptive walk chooses from at each step, besides those between points of the front.
_MAX_CANDIDATES = 500
#: Points at which the volume below the front is probed, and draws from the model at each candidate.
_NUM_PROBES, _NUM_DRAWS = 2000, 8
_LENGTHS = (0.1, 0.2, 0.35, 0.6, 1.0)
_NOISES = (1e-4, 1e-3, 1e-2, 1e-1)


def lattice(num_tasks: int, steps: int) -> Weights:
    """Return all weights that are multiples of 1/steps, the last task's growing first."""
    bars = combinations(range(steps + num_tasks - 1), num_tasks - 1)
    edges = np.array([(-1, *places, steps + num_tasks - 1) for places in bars], dtype=np.float64)
    return (np.diff(edges, axis=1) - 1) / steps


def grid(num_tasks: int, budget: int) -> Weights:
    """Return the finest lattice of at most `budget` points; the corners if even these are more."""
    steps = 1
    while num_tasks > 1 and math.comb(steps + num_tasks, num_tasks - 1) <= budget:
        steps += 1
    return lattice(num_tasks, steps)


def schedule(num_tasks: int, budget: int) -> Weights:
    """Return geometric weights whose ratio goes from 1/16 to 16, the first tasks' favour first."""
    ratios = 16.0 ** np.linspace(-1, 1, budget)
    masses = ratios[:, None] ** np.arange(num_tasks)
    return np.asarray(masses / masses.sum(axis=1, keepdims=True))


def first_design(num_tasks: int, budget: int) -> Weights:
    """Return uniform weights, the corners, and the middles of edges: half the budget at most."""
    corners = np.eye(num_tasks)
    # The middle of the only edge of two tasks is the uniform weights again.
    pairs = combinations(range(num_tasks), 2) if num_tasks > 2 else ()
    edges = [(corners[i] + corners[j]) / 2 for i, j in pairs]
    points = np.array([np.full(num_tasks, 1 / num_tasks), *corners, *edges])
    return points[: max(num_tasks + 1, budget // 2)][:budget]


def propose(
    weights: Weights, values: Values, reference: Sequence[float]
) -> Float64[np.ndarray, " tasks"] | None:
    """Return the weights to try next, or None if there are none that were not tried.

    Args:
        weights, values: What was tried, and every score there; higher is better.
        reference: Scores below which a model is worth nothing.
    """
    candidates = _untried(weights, values)
    if not len(candidates):
        return None
    means, errors = _predict(weights, values, candidates)
    return np.array(candidates[int(np.argmax(_expected_gain(means, errors, values, reference)))])


def _untried(weights: Weights, values: Values) -> Weights:
    """Return candidates: a lattice, and the middles between points of the front."""
    num_tasks = weights.shape[1]
    best = weights[front(values)]
    pairs = list(combinations(range(len(best)), 2))[:_MAX_CANDIDATES]
    middles = np.array([(best[i] + best[j]) / 2 for i, j in pairs]).reshape(-1, num_tasks)
    found = np.unique(np.concatenate([grid(num_tasks, _MAX_CANDIDATES), middles]).round(12), axis=0)
    distances = np.abs(found[:, None] - weights[None]).sum(axis=2).min(axis=1)
    return np.asarray(found[distances > 1e-3])


def _predict(weights: Weights, values: Values, candidates: Weights) -> tuple[Values, Values]:
    """Return mean and standard deviation of each score at the candidates."""
    centre, spread = values.mean(axis=0), values.std(axis=0) + 1e-9
    scaled = (values - centre) / spread
    squares, crossed = _squared_distances(weights, weights), _squared_distances(candidates, weights)
    means, errors = np.empty((2, len(candidates), values.shape[1]))
    for score in range(values.shape[1]):
        length, noise = _best_kernel(squares, scaled[:, score])
        inverse = np.linalg.inv(_kernel(squares, length) + noise * np.eye(len(weights)))
        towards = _kernel(crossed, length)
        means[:, score] = towards @ inverse @ scaled[:, score]
        amplitude = scaled[:, score] @ inverse @ scaled[:, score] / len(weights)
        left = np.maximum(1 - np.einsum("ij,jk,ik->i", towards, inverse, towards), 1e-12)
        errors[:, score] = np.sqrt(amplitude * left)
    return means * spread + centre, errors * spread


def _squared_distances(first: Weights, second: Weights) -> Float64[np.ndarray, "first second"]:
    return np.asarray(((first[:, None] - second[None]) ** 2).sum(axis=2))


def _kernel(squares: np.ndarray, length: float) -> np.ndarray:
    return np.exp(-squares / (2 * length**2))


def _best_kernel(squares: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Return length and noise of the highest marginal likelihood, whatever the amplitude."""

    def unlikeliness(pair: tuple[float, float]) -> float:
        matrix = _kernel(squares, pair[0]) + pair[1] * np.eye(len(values))
        misfit = float(values @ np.linalg.solve(matrix, values)) / len(values)
        return len(values) * math.log(misfit + 1e-12) + float(np.linalg.slogdet(matrix)[1])

    return min(((length, noise) for length in _LENGTHS for noise in _NOISES), key=unlikeliness)


def _expected_gain(
    means: Values, errors: Values, values: Values, reference: Sequence[float]
) -> Float64[np.ndarray, " candidates"]:
    """Return how many probes each candidate is expected to bring below the front."""
    floor = np.asarray(reference)
    ceiling = np.maximum(np.maximum(values.max(axis=0), means.max(axis=0)), floor + 1e-9)
    probes = floor + _spread_evenly(_NUM_PROBES, values.shape[1]) * (ceiling - floor)
    open_ = probes[~covered(probes, values)]
    draws = _normal(_spread_evenly(_NUM_DRAWS, values.shape[1]))
    gains = np.zeros(len(means))
    for draw in draws:
        reached = means + draw * errors
        below = np.ones((len(means), len(open_)), dtype=bool)
        for score in range(values.shape[1]):
            below &= reached[:, score, None] >= open_[None, :, score]
        gains += below.sum(axis=1)
    # Where nothing is expected to gain, the least known candidate is tried.
    unknown = errors.sum(axis=1)
    return np.asarray(gains + unknown / (1 + unknown.max()))


def _spread_evenly(count: int, dimensions: int) -> Float64[np.ndarray, "count dimensions"]:
    """Return points that fill the unit cube evenly (Roberts's additive recurrence)."""
    root = 2.0
    for _ in range(40):
        root = (1 + root) ** (1 / (dimensions + 1))
    steps = root ** -np.arange(1.0, dimensions + 1)
    return (0.5 + np.arange(1, count + 1)[:, None] * steps) % 1


def _normal(uniform: np.ndarray) -> np.ndarray:
    from scipy.special import ndtri

    return np.asarray(ndtri(uniform))


def as_written(weights: Float64[np.ndarray, " tasks"]) -> tuple[float, ...]:
    """Return weights as a recipe holds them: four digits, and a sum of exactly 1."""
    parts = np.floor(weights * 10_000 + 1e-6)
    missing = round(10_000 - parts.sum())
    # To where rounding took most; equal ones to the first.
    parts[np.argsort(-(weights * 10_000 - parts), kind="stable")[:missing]] += 1
    return tuple(float(part) / 10_000 for part in parts)
