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


def to_norm(vector: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return what is kept, multiplied so that the sum of its magnitudes is the vector's."""
    left = np.abs(kept).sum()
    return kept * (np.abs(vector).sum() / left) if left else kept


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


def slerp(start: np.ndarray, end: np.ndarray, t: float, straight_above: float = 0.9995) -> np.ndarray:
    """Return the point at t of the arc between two whole tensors; of a straight line where they are near."""
    cosine = (start * end).sum() / np.sqrt((start**2).sum() * (end**2).sum())
    if abs(cosine) > min(straight_above, 1 - 1e-15):
        return (1 - t) * start + t * end
    angle = np.arccos(np.clip(cosine, -1, 1))
    return (np.sin((1 - t) * angle) * start + np.sin(t * angle) * end) / np.sin(angle)


def multislerp(vectors: Arrays, weights: Sequence[float]) -> np.ndarray:
    """Return the mean direction times the mean length."""
    shares = [weight / sum(weights) for weight in weights]
    lengths = [np.sqrt((vector**2).sum()) for vector in vectors]
    mean = sum(s * v / n for s, v, n in zip(shares, vectors, lengths, strict=True) if n)
    length = np.sqrt((mean**2).sum())
    return mean / (length or 1) * sum(s * n for s, n in zip(shares, lengths, strict=True))


def model_stock(base: np.ndarray, tasks: Arrays, floor: float = 1e-6) -> np.ndarray:
    """Return the base model and t times the mean of the task vectors, t from their mean cosine."""
    vectors = [task - base for task in tasks]
    pairs = [(one, other) for n, one in enumerate(vectors) for other in vectors[:n]]
    products = [np.sqrt((one**2).sum() * (other**2).sum()) for one, other in pairs]
    cosines = [(a * b).sum() / max(p, floor) for (a, b), p in zip(pairs, products, strict=True)]
    mean, count = float(np.mean(cosines)), len(tasks)
    return base + count * mean / (1 + (count - 1) * mean) * sum(vectors) / count
