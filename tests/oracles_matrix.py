"""Slow and obvious versions of the methods of whole matrices, written from the papers.

Plain decompositions of numpy in float64. A direction is absent whose singular value is not above a
millionth of the largest one.
"""

import math
from collections.abc import Callable, Sequence

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


def iso_c(vectors: np.ndarray, weights: Weights) -> np.ndarray:
    """Iso-C: the sum with all its singular values replaced by their mean."""
    vectors, _, shares = counting(vectors, weights)
    left, strengths, right = decomposed(mean(vectors, shares))
    return left @ right.T * strengths.sum() / min(vectors.shape[1:])


def iso_cts(common: float) -> Callable[[np.ndarray, Weights], np.ndarray]:
    """Iso-CTS: directions of the sum, and of each task outside of them, orthonormal and equally strong."""

    def oracle(vectors: np.ndarray, weights: Weights) -> np.ndarray:
        vectors, weights, shares = counting(vectors, weights)
        rank, num_tasks = min(vectors.shape[1:]), len(vectors)
        num_own = round((rank - math.floor(common * rank + 1e-9)) / num_tasks) * num_tasks
        if num_own > rank:
            num_own -= num_tasks
        left, strength, right = decomposed(mean(vectors, shares))
        kept = rank - num_own
        lefts, strengths, rights = [left[:, :kept]], [strength[:kept]], [right[:, :kept]]
        for vector, count, share in zip(vectors, handed_out(weights, num_own), shares, strict=True):
            outside = vector - left[:, :kept] @ left[:, :kept].T @ vector
            own = decomposed(outside) if np.linalg.norm(outside) > 1e-6 * np.linalg.norm(vector) else None
            if own is not None:
                least = own[1] > 1e-6 * np.linalg.norm(vector)
                lefts.append(own[0][:, least][:, :count])
                strengths.append(share * own[1][least][:count])
                rights.append(own[2][:, least][:, :count])
        strength = np.concatenate(strengths).sum() / rank
        return orthonormal(np.hstack(lefts)) @ orthonormal(np.hstack(rights)).T * strength

    return oracle


def handed_out(weights: Weights, number: int) -> list[int]:
    """Floors of shares; what is left goes one each to the first tasks."""
    counts = [math.floor(weight * number + 1e-9) for weight in weights]
    return [count + (task < number - sum(counts)) for task, count in enumerate(counts)]


def cart(rank: float, spread: float) -> Callable[[np.ndarray, Weights], np.ndarray]:
    """CART: the mean, and low-rank approximations of what each task has besides it."""

    def oracle(vectors: np.ndarray, weights: Weights) -> np.ndarray:
        vectors, weights, shares = counting(vectors, weights)
        middle = mean(vectors, weights)
        merged = middle.copy()
        count = max(1, math.floor(rank * min(middle.shape) + 1e-9))
        for vector, share in zip(vectors, shares, strict=True):
            left, strengths, right = decomposed(vector - middle)
            present = strengths > 1e-6 * np.linalg.norm(vector)
            cut = (left * strengths * present)[:, :count] @ right[:, :count].T
            merged += spread * share * cut
        return merged

    return oracle


def wudi(
    share: float | None = None, time: float | None = None
) -> Callable[[np.ndarray, Weights], np.ndarray]:
    """SWUDI: gradient descent from the sum, to its end or for a time, in the strongest directions of C."""

    def oracle(vectors: np.ndarray, weights: Weights) -> np.ndarray:
        vectors, _, shares = counting(vectors, weights)
        start = mean(vectors, shares)
        moments, aims = np.zeros((start.shape[1],) * 2), np.zeros_like(start)
        for vector, part in zip(vectors, shares, strict=True):
            if vector.any():
                factor = part / np.linalg.norm(vector) ** 2
                moments += factor * vector.T @ vector
                aims += factor * vector @ vector.T @ vector
        squares, directions = np.linalg.eigh(moments)
        squares, directions = squares[::-1], directions[:, ::-1]
        present = int((squares > 1e-12 * squares[0]).sum())
        effective = np.sqrt(squares[:present]).sum() ** 2 / max(squares[:present].sum(), 1e-300)
        count = math.ceil(effective if share is None else share * len(squares) - 1e-9)
        merged = start.copy()
        for square, direction in list(zip(squares, directions.T, strict=True))[: min(present, count)]:
            reached = 1.0 if time is None else 1 - math.exp(-square * time)
            merged += reached * np.outer(aims @ direction / square - start @ direction, direction)
        return merged

    return oracle


def actmat(ridge: float) -> Callable[[np.ndarray, Weights], np.ndarray]:
    """The regularised least-squares solution, by one inverse."""

    def oracle(vectors: np.ndarray, weights: Weights) -> np.ndarray:
        vectors, weights, _ = counting(vectors, weights)
        if len(vectors) == 1:
            return vectors[0]
        moments = [vector.T @ vector for vector in vectors]
        total = mean(np.array(moments), weights)
        largest = np.linalg.norm(total, 2)
        aims = mean(np.array([v @ g for v, g in zip(vectors, moments, strict=True)]), weights)
        if not largest:
            return aims
        return aims @ np.linalg.inv(total / largest + ridge * np.eye(len(total))) / largest

    return oracle


def opcm(share: float) -> Callable[[np.ndarray, Weights], np.ndarray]:
    """OPCM: the sum so far, in its own directions, takes of the next vector what is outside of them."""

    def oracle(vectors: np.ndarray, weights: Weights) -> np.ndarray:
        vectors, weights, _ = counting(vectors, weights)
        total = weights[0] * vectors[0]
        for vector, weight in zip(vectors[1:], weights[1:], strict=True):
            left, strengths, right = decomposed(total)
            new, reached, is_main = vector.copy(), 0.0, True
            main = 0
            for strength in strengths:
                reached += strength
                is_main = is_main and reached <= share * strengths.sum()
                main += is_main
            for row, one in enumerate(left.T):
                for column, other in enumerate(right.T):
                    if row == column or max(row, column) < main:
                        new -= (one @ vector @ other) * np.outer(one, other)
            total = total + weight * new
        size = np.linalg.norm(total)
        norm = sum(w * np.linalg.norm(v) for w, v in zip(weights, vectors, strict=True))
        return total * norm / size if size else total

    return oracle
