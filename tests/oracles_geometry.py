"""Methods of lengths and angles, written from their definitions on whole vectors, and not from the package.

Each takes task vectors, "tasks *shape", weights and the base model's values, in float64, and returns the
merged task vector.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

Merge = Callable[[np.ndarray, Sequence[float], np.ndarray], np.ndarray]


def norm(vector: np.ndarray) -> float:
    """Length, also of vectors whose squares no number holds."""
    largest = float(np.abs(vector).max(initial=0.0))
    return largest * math.sqrt(float(((vector / largest) ** 2).sum())) if largest else 0.0


def unit(vector: np.ndarray) -> np.ndarray:
    length = norm(vector)
    return vector / length if length else vector


def directions(vectors: list[np.ndarray]) -> list[np.ndarray]:
    """Unit vectors, zeros for what is far shorter than the longest."""
    lengths = [norm(vector) for vector in vectors]
    pairs = zip(vectors, lengths, strict=True)
    return [unit(vector) if length > 2.0**-64 * max(lengths) else 0 * vector for vector, length in pairs]


def arc(one: np.ndarray, other: np.ndarray, t: float, linear_above: float) -> np.ndarray:
    """Spherical interpolation, straight where it has no direction or hardly an angle."""
    cosine = float((unit(one) * unit(other)).sum())
    sine = math.sqrt(max(0.0, 1 - cosine**2))
    if not norm(one) or not norm(other) or abs(cosine) > linear_above or sine < 1e-8:
        return (1 - t) * one + t * other
    angle = math.atan2(sine, cosine)
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * other) / math.sin(angle)


def by_vector(each: str, merge: Merge) -> Merge:
    """Merge every row, or every column, by itself."""
    if each == "tensor":
        return merge

    def whole(vectors: np.ndarray, weights: Sequence[float], base: np.ndarray) -> np.ndarray:
        if base.ndim < 2:
            return merge(vectors, weights, base)
        axis = 0 if each == "row" else 1
        flat = vectors.reshape(*vectors.shape[:2], -1)
        below = base.reshape(len(base), -1)
        parts = [
            merge(flat.take(n, axis + 1), weights, below.take(n, axis)) for n in range(below.shape[axis])
        ]
        return np.stack(parts, axis).reshape(base.shape)

    return whole


def slerp(t: float = 1.0, linear_above: float = 0.9995) -> Merge:
    def merge(vectors: np.ndarray, weights: Sequence[float], base: np.ndarray) -> np.ndarray:
        first, *more = [task for task, weight in enumerate(weights) if weight]
        found = base + vectors[first]
        for second in more:
            found = arc(found, base + vectors[second], weights[second], linear_above)
        return arc(base, found, t, linear_above) - base

    return merge


def nuslerp(of: str = "task_vectors", each: str = "tensor") -> Merge:
    def merge(vectors: np.ndarray, weights: Sequence[float], base: np.ndarray) -> np.ndarray:
        below = base if of == "models" else np.zeros_like(base)
        active = [task for task, weight in enumerate(weights) if weight]
        if len(active) == 1:
            return vectors[active[0]]
        first, second = active
        return arc(below + vectors[first], below + vectors[second], weights[second], 1.0) - below

    return by_vector(each, merge)


def multislerp(of: str = "task_vectors") -> Merge:
    """Barycentre in the tangent space at the weighted mean, brought back to the sphere: step by step."""

    def merge(vectors: np.ndarray, weights: Sequence[float], base: np.ndarray) -> np.ndarray:
        below = base if of == "models" else np.zeros_like(base)
        points = directions([below + vector for vector in vectors])
        pairs = list(zip(weights, points, strict=True))
        mean = sum(weight * point for weight, point in pairs)
        length = sum(weight * norm(below + vector) for weight, vector in zip(weights, vectors, strict=True))
        if norm(mean) < 1e-8:
            return sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))
        centre = unit(mean)
        tangent = sum(weight * (point - (point * centre).sum() * centre) for weight, point in pairs)
        step = norm(tangent)
        found = centre * math.cos(step) + (tangent * (math.sin(step) / step) if step else 0.0)
        return length * found - below

    return merge


def karcher(of: str = "models", steps: int = 200) -> Merge:
    """The mean by many small steps down the sum of squared angles."""

    def merge(vectors: np.ndarray, weights: Sequence[float], base: np.ndarray) -> np.ndarray:
        below = base if of == "models" else np.zeros_like(base)
        points = directions([below + vector for vector in vectors])
        length = sum(weight * norm(below + vector) for weight, vector in zip(weights, vectors, strict=True))
        mean = sum(weight * point for weight, point in zip(weights, points, strict=True))
        if norm(mean) < 1e-8:
            return sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))
        for _ in range(steps):
            mean = unit(mean)
            downhill = np.zeros_like(mean)
            for weight, point in zip(weights, points, strict=True):
                away = point - (point * mean).sum() * mean
                angle = math.atan2(norm(away), float((point * mean).sum())) if norm(point) else 0.0
                downhill += weight * angle * unit(away)
            mean = mean + 0.3 * downhill
        return length * unit(mean) - below

    return merge


def model_stock(each: str = "tensor") -> Merge:
    """The multiple of the weighted mean that is nearest to what the task vectors have in common.

    They are taken for vectors of one length, any two of which have the same cosine c: it is the square length
    of the common part, in units of theirs, and the inner product of every one with it.
    """

    def merge(vectors: np.ndarray, weights: Sequence[float], base: np.ndarray) -> np.ndarray:
        mean = sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))
        active = [task for task, weight in enumerate(weights) if weight]
        if len(active) == 1:
            return mean
        pairs = list(itertools.combinations(active, 2))
        shares = [weights[one] * weights[other] for one, other in pairs]
        cosines = [float((unit(vectors[one]) * unit(vectors[other])).sum()) for one, other in pairs]
        common = math.fsum(s * c for s, c in zip(shares, cosines, strict=True)) / math.fsum(shares)
        if common <= 1e-12:
            return np.zeros_like(base)
        alike = np.where(np.eye(len(weights)) > 0, 1.0, common)
        return common / float(np.array(weights) @ alike @ np.array(weights)) * mean

    return by_vector(each, merge)


def arcee_fusion(vectors: np.ndarray, weights: Sequence[float], base: np.ndarray) -> np.ndarray:
    merged = np.zeros_like(base)
    for vector, weight in zip(vectors, weights, strict=True):
        if weight:
            importance = np.abs(vector) * divergence(base + vector, base)
            ranked = np.sort(importance, axis=None)
            first, median, third = (ranked[math.floor(q * (len(ranked) - 1))] for q in (0.25, 0.5, 0.75))
            merged = merged + weight * np.where(importance >= median + 1.5 * (third - first), vector, 0.0)
    return merged


def divergence(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    p, q = (softmax(np.atleast_1d(values)) + 1e-8 for values in (after, before))
    found = (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    return found if after.ndim else found[0]


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
