"""Methods of mergekit on numpy arrays in float64, from their definitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Arrays = Sequence[np.ndarray]


def linear(models: Arrays, weights: Sequence[float], normalize: bool = True) -> np.ndarray:
    """Return Σ w θ, divided by Σ w."""
    total = sum(weights) if normalize else 1.0
    return sum(w * model for w, model in zip(weights, models, strict=True)) / total


def trimmed(vector: np.ndarray, density: float, gamma: float | None = None) -> np.ndarray:
    """Return a task vector with its int(density · n) largest magnitudes, those of TIES at least one.

    With gamma, which is Breadcrumbs', they are the next ones after the int(gamma · n) largest.
    """
    if density >= 1:
        return vector
    flat = vector.ravel()
    removed = int((gamma or 0.0) * flat.size)
    count = max(int(density * flat.size), int(gamma is None))
    kept = np.argsort(-np.abs(flat), kind="stable")[removed : removed + count]
    found = np.zeros_like(flat)
    found[kept] = flat[kept]
    return found.reshape(vector.shape)


def added(
    base: np.ndarray,
    tasks: Arrays,
    weights: Sequence[float],
    *,
    elects: bool = False,
    normalize: bool = False,
    scaling: float = 1.0,
    sparsify: Callable[[int, np.ndarray], np.ndarray] = lambda number, vector: vector,
) -> np.ndarray:
    """Return base + scaling · Σ w τ, over the tasks that agree in sign, and over the sum of their weights."""
    vectors = np.stack([sparsify(n, task - base) for n, task in enumerate(tasks)])
    factors = np.reshape(np.array(weights, float), (-1, *(1,) * base.ndim))
    weighted = factors * vectors
    agrees = np.ones(weighted.shape, bool)
    if elects:
        side = np.where(weighted.sum(axis=0) >= 0, 1.0, -1.0)
        agrees = np.sign(weighted) == side
    total = np.where(agrees, weighted, 0.0).sum(axis=0)
    if normalize:
        divisor = np.where(agrees, factors, 0.0).sum(axis=0)
        total = total / np.where(np.abs(divisor) < 1e-8, 1.0, divisor)
    return base + scaling * total
