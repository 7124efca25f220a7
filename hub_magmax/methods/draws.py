"""Draws of methods: tasks picked at random, and elements dropped at random (DARE, arXiv:2311.03099, step 1).

A draw for an element and a task depends on the generator, the element's index and the task's number alone.
Other tasks, their number and the density change no draw: a higher density keeps what a lower one does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from hub_magmax.kernels.backend import Backend
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.methods.selection.streams import DARE

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
    streams = range(DARE, DARE + (len(most) + 1) // 2)
    return backend.drop(start, count, generator, streams, np.resize(most, 2 * len(streams))).T


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
