"""Slow and obvious versions of methods that keep a part of each task vector, from their papers.

Plain Python, one element at a time, in exact fractions where nothing else is said.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from tests import oracles

Vectors = np.ndarray


def stitch(columns: Sequence[dict[int, Fraction]], weights: Sequence[float]) -> list[float]:
    """Average, per element, what tasks keep of it, given by task; one that keeps it alone gives it whole."""
    merged = []
    for kept in columns:
        wanted = {task: value for task, value in kept.items() if weights[task] > 0}
        mass = sum(Fraction(weights[task]) for task in wanted)
        total = sum(Fraction(weights[task]) * value for task, value in wanted.items())
        merged.append(float(total / mass) if wanted else 0.0)
    return merged


def localize_stitch(vectors: Vectors, density: str, weights: Sequence[float]) -> list[float]:
    """Localize-and-Stitch without data: the largest magnitudes of each task, averaged where they overlap."""
    columns: list[dict[int, Fraction]] = [{} for _ in range(vectors.shape[1])]
    for task, vector in enumerate(vectors):
        wanted = math.ceil(Fraction(density) * len(vector))
        least = sorted((abs(float(value)) for value in vector), reverse=True)[wanted - 1]
        for element, value in enumerate(vector):
            if value != 0 and abs(float(value)) >= least:
                columns[element][task] = Fraction(float(value))
    return stitch(columns, weights)


def ram(
    vectors: Vectors, epsilon: float, weights: Sequence[float], boost: float = 0.0, most: float = 0.0
) -> list[float]:
    """RAM: unique changes as they are, or enlarged, and shared ones averaged."""
    columns = [
        {
            task: Fraction(float(value))
            for task, value in enumerate(column)
            if abs(float(value)) > epsilon and weights[task] > 0
        }
        for column in vectors.T
    ]
    factors = []
    for task in range(len(vectors)):
        unique = sum(list(kept) == [task] for kept in columns)
        shared = sum(task in kept and len(kept) > 1 for kept in columns)
        ratio = Fraction(shared, unique) if unique else Fraction(0)
        factors.append(1 + Fraction(boost) * min(ratio, Fraction(most)))
    boosted = [
        {task: value * (factors[task] if len(kept) == 1 else 1) for task, value in kept.items()}
        for kept in columns
    ]
    return stitch(boosted, weights)


def nearswap(vectors: Vectors, limit: float, weights: Sequence[float]) -> list[float]:
    """Move from the base model to each checkpoint by the share t / |difference|, at most all the way."""
    merged = []
    for column in vectors.T:
        moved = Fraction(0)
        for value, weight in zip(column, weights, strict=True):
            exact = Fraction(float(value))
            share = min(Fraction(1), Fraction(limit) / abs(exact)) if exact else Fraction(1)
            moved += Fraction(weight) * share * exact
        merged.append(float(moved))
    return merged


def della_factors(
    vectors: Vectors, length: int, density: float, epsilon: float, seed: int, name: str
) -> list[list[Fraction]]:
    """MAGPRUNE: keep with a probability that the rank in a row decides; one over that, or zero where dropped.

    Equal magnitudes share the mean of their ranks. Draws are those of DARE.
    """
    found: list[list[Fraction]] = []
    reach = min(epsilon, density, 1 - density)
    for task, vector in enumerate(vectors):
        factors = []
        for element, value in enumerate(vector):
            begin = element // length * length
            row = [abs(float(other)) for other in vector[begin : begin + length]]
            below, equal = sum(other < abs(float(value)) for other in row), row.count(abs(float(value)))
            rank = Fraction(2 * below + equal - 1, 2)
            wanted = Fraction(density)
            if length > 1:
                wanted += Fraction(reach) * (2 * rank / (length - 1) - 1)
            # In steps of the draws, upwards.
            wanted = max(Fraction(math.ceil(wanted * 2**32 - Fraction(1, 2**16)), 2**32), Fraction(1, 2**32))
            is_kept = oracles.is_kept(float(wanted), seed, name, task, element)
            factors.append(1 / wanted if is_kept else Fraction(0))
        found.append(factors)
    return found


def della(
    vectors: Vectors, length: int, density: float, epsilon: float, rescale: str = "probability"
) -> Vectors:
    """The task vectors after dropping and rescaling, by 1/p, to their norms, or not at all."""
    factors = della_factors(vectors, length, density, epsilon, 0, "")
    pruned = []
    for vector, own in zip(vectors, factors, strict=True):
        kept = [
            Fraction(float(value)) * (1 if factor else 0) for value, factor in zip(vector, own, strict=True)
        ]
        if rescale == "probability":
            kept = [Fraction(float(value)) * factor for value, factor in zip(vector, own, strict=True)]
        pruned.append(to_norm(vector, kept) if rescale == "norm" else [float(value) for value in kept])
    return np.array(pruned)


def to_norm(vector: np.ndarray, kept: Sequence[Fraction | float]) -> list[float]:
    """What is kept of a vector, multiplied so that the sum of magnitudes is the vector's."""
    exact = [Fraction(value) for value in kept]
    ratio = sum(abs(Fraction(float(value))) for value in vector) / (sum(map(abs, exact)) or 1)
    return [float(value * ratio) for value in exact]


def sce(vectors: Vectors, density: str, weights: Sequence[float], floor: float = 0) -> list[float]:
    """SCE: select what varies most, calculate weights by energy, erase the minority of signs."""
    active = [task for task, weight in enumerate(weights) if weight > 0]
    exact = [[Fraction(float(value)) for value in vector] for vector in vectors]
    variances = []
    for element in range(vectors.shape[1]):
        own = [exact[task][element] for task in active]
        mean = sum(own) / len(own)
        variances.append(sum((value - mean) ** 2 for value in own))
    selected = list(range(len(variances)))
    if len(active) > 1 and Fraction(density) < 1:
        wanted = math.ceil(Fraction(density) * sum(variance > 0 for variance in variances))
        # Standard deviations are compared as float32 numbers.
        rounded = [np.float32(math.sqrt(variance / len(active))) for variance in variances]
        least = sorted(rounded, reverse=True)[wanted - 1] if wanted else np.float32(np.inf)
        selected = [element for element in selected if rounded[element] >= least]
    energies = [sum(exact[task][element] ** 2 for element in selected) for task in range(len(vectors))]
    if sum(energies[task] for task in active) < Fraction(floor) * vectors.shape[1]:
        energies = [Fraction(1)] * len(vectors)
    merged = [0.0] * vectors.shape[1]
    for element in selected:
        votes = sum(Fraction(weights[task]) * exact[task][element] for task in active)
        agree = [task for task in active if exact[task][element] * votes > 0]
        mass = sum(Fraction(weights[task]) * energies[task] for task in agree)
        total = sum(Fraction(weights[task]) * energies[task] * exact[task][element] for task in agree)
        merged[element] = float(total / mass) if mass else 0.0
    return merged


def pcb(vectors: Vectors, density: str, weights: Sequence[float]) -> list[float]:
    """PCB-Merging: intra and inter balancing, drop, rescale to between 0 and 1, weighted mean; in floats.

    Scores are compared as float32 numbers, and count from zero up.
    """
    active = [task for task, weight in enumerate(weights) if weight > 0]
    size, count = vectors.shape[1], len(active)
    # In the order of the tasks, with multipliers as float32: what cancels is a matter of roundings.
    numbers = {task: float(np.float32(count * weights[task])) for task in active}
    together = [sum(numbers[task] * float(vectors[task, i]) for task in active) for i in range(size)]
    scales, clamped = {}, {}
    for task in active:
        sizes = sorted((abs(float(value)) for value in vectors[task]), reverse=True)
        high, low = sizes[size // 10_000], sizes[size - 1 - size // 10_000]
        claims, bounded = [], []
        for element, value in enumerate(map(float, vectors[task])):
            within = min(max(abs(value), low), high)
            place = (within - low) / (high - low) if high > low else 0.0
            claim = math.exp(count * (place**2 - 1)) * math.tanh(value * together[element])
            claims.append(float(np.float32(max(claim, 0.0))))
            bounded.append(math.copysign(within, value) if value else 0.0)
        ranked = sorted(claims, reverse=True)
        top, least = ranked[0], ranked[math.ceil(Fraction(density) * size) - 1]
        scales[task] = [
            0.0 if claim < least or claim == 0 else (claim - least) / (top - least) if top > least else 1.0
            for claim in claims
        ]
        clamped[task] = bounded
    merged = []
    for element in range(size):
        mass = math.fsum(weights[task] * scales[task][element] for task in active)
        total = math.fsum(weights[task] * scales[task][element] * clamped[task][element] for task in active)
        merged.append(total / mass if mass else 0.0)
    return merged
