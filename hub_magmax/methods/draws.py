"""Draws of methods: tasks picked at random, and elements dropped at random (DARE, arXiv:2311.03099, step 1).

DELLA (arXiv:2406.11617) drops by the same draws, with a probability for each rank.

A draw for an element and a task depends on the generator, the element's index and the task's number alone.
Other tasks, their number and the density change no draw: a higher density keeps what a lower one does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, UInt8, UInt32

from hub_magmax.kernels.backend import Backend
from hub_magmax.kernels.randomness import CounterGenerator

# Streams, one for each use and task: the stream of a use is this number plus the task.
# DARE adds the number of a pair of tasks, which share a key, and comes last: it takes any number of them.
DROP, ALIGN, FILL, SHARE, TIE, PASSED, DARE = range(0, 7 * 256, 256)

#: A key of 64 bits serves two tasks.
_DRAWS = 2**32


def probability(density: float) -> float:
    """Return `density` rounded up to a multiple of 2**-32: the probability with which an element is kept."""
    return math.ceil(density * _DRAWS) / _DRAWS


def draw_kept(
    start: int, count: int, density: Sequence[float], generator: CounterGenerator, backend: Backend
) -> UInt8[np.ndarray, "count bytes"]:
    """Draw which elements are kept for which tasks: a bit each, eight tasks in a byte, the first one lowest.

    Args:
        start: Index of the first element in its tensor.
        count: Elements to draw for.
        density: For each task the probability of keeping an element, above 0 and up to 1, as `probability`
            rounds it. Bits of the last byte that belong to no task mean nothing.
        generator: The tensor's.
        backend: Draws; every one draws the same.
    """
    most = np.array([int(probability(one) * _DRAWS) - 1 for one in density], np.uint32)
    streams = streams_of(len(most))
    return backend.drop(start, count, generator, streams, np.resize(most, 2 * len(streams))).T


def streams_of(num_tasks: int) -> range:
    """Return the streams whose keys draw for tasks, each for two."""
    return range(DARE, DARE + (num_tasks + 1) // 2)


def rank_table(
    length: int, density: Sequence[float], epsilon: Sequence[float], *, is_rescaled: bool
) -> tuple[UInt32[np.ndarray, "tasks ranks"], Float32[np.ndarray, "tasks ranks"]]:
    """Return the largest draw that keeps an element, and what it is multiplied by, by twice its rank.

    The probability grows evenly from density - epsilon for the smallest rank to density + epsilon for the
    largest; epsilon is lowered where they would leave the range from 0 to 1, so that their mean is always the
    density.

    Args:
        length: Elements of a row.
        density: Mean probability, for each task.
        epsilon: At least 0, for each task.
        is_rescaled: A kept element is divided by its probability; else it is multiplied by 1.
    """
    ranks = np.arange(2 * length - 1) / max(length - 1, 1)
    most, factors = (np.empty((len(density), len(ranks)), dtype) for dtype in (np.uint32, np.float32))
    for task, (mean, wanted) in enumerate(zip(density, epsilon, strict=True)):
        half = min(wanted, mean, 1.0 - mean) if length > 1 else 0.0
        keys = np.clip(np.ceil((mean - half + half * ranks) * _DRAWS), 1, _DRAWS)
        most[task] = keys - 1
        factors[task] = _DRAWS / keys if is_rescaled else 1.0
    return most, factors


def random_mix(
    start: int, count: int, weights: Sequence[float], generator: CounterGenerator, backend: Backend
) -> UInt8[np.ndarray, " count"]:
    """Return a task for each element, drawn with `weights` as probabilities.

    Args:
        start: Index of the first element in its tensor.
        count: Elements to draw for.
        weights: Non-negative, sum to 1; a weight of zero is never drawn.
        generator: The tensor's.
        backend: Draws; every one draws the same.
    """
    wanted = np.array([task for task, weight in enumerate(weights) if weight > 0], dtype=np.uint8)
    edges = np.array([weights[task] for task in wanted]).cumsum()
    # The last edge is left out: sums of floats may end just below 1. A draw is the 53 high bits of a key, so
    # it reaches an edge where the key reaches this:
    least = [math.ceil(math.ldexp(edge, 53)) << 11 for edge in edges[:-1].tolist()]
    reachable = np.array([key for key in least if key < 1 << 64], dtype=np.uint64)
    return backend.mix(start, count, generator, reachable, wanted)
