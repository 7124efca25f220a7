"""Slow and obvious versions of the methods of whole matrices, written from the papers.

Plain decompositions of numpy in float64. A direction is absent whose singular value is not above a
millionth of the largest one.
"""

from collections.abc import Sequence

import numpy as np

Weights = Sequence[float]


def decomposed(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The singular directions that a matrix has, as columns, rows between them as numbers: U, σ, V."""
    left, strengths, right = np.linalg.svd(matrix, full_matrices=False)
    kept = strengths > 1e-6 * max(strengths, default=0)
    return left[:, kept], strengths[kept], right[kept].T


def mean(vectors: np.ndarray, weights: Weights) -> np.ndarray:
    return sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))


def counting(vectors: np.ndarray, weights: Weights) -> tuple[np.ndarray, list[float], list[float]]:
    """The task vectors and weights of tasks with a weight, and these as shares of the largest."""
    kept = [task for task, weight in enumerate(weights) if weight > 0]
    chosen = [weights[task] for task in kept]
    return vectors[kept], chosen, [weight / max(chosen) for weight in chosen]


def orthonormal(columns: np.ndarray) -> np.ndarray:
    left, _, right = decomposed(columns)
    return left @ right.T


def tsv(vectors: np.ndarray, weights: Weights) -> np.ndarray:
    """TSV-M: the strongest directions of all tasks beside each other, left and right made orthonormal."""
    vectors, weights, shares = counting(vectors, weights)
    rank = min(vectors.shape[1:])
    if len(vectors) == 1:
        return vectors[0]
    if rank < len(vectors):
        return mean(vectors, weights)
    lefts, strengths, rights = [], [], []
    for vector, weight, share in zip(vectors, weights, shares, strict=True):
        left, strength, right = decomposed(vector)
        count = int(rank * weight + 1e-9)
        lefts.append(left[:, :count])
        strengths.append(share * strength[:count])
        rights.append(right[:, :count])
    left, right = orthonormal(np.hstack(lefts)), orthonormal(np.hstack(rights))
    return left @ np.diag(np.concatenate(strengths)) @ right.T
