"""Task vectors whose elements are dropped at random and rescaled: DARE (arXiv:2311.03099), step 1.

What is drawn for an element and a task depends on the generator, the element's index and the task's number
alone. Other tasks, their number and the density change no draw: a higher density keeps what a lower one does.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float32, UInt8

from hub_magmax.kernels.compiled import cache
from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.reference import Weights, elected_mean, weighted_sum
from hub_magmax.methods.selection import Rows
from hub_magmax.methods.selection.streams import DARE

#: A key of 64 bits serves two tasks.
_DRAWS = 2**32


def probability(density: float) -> float:
    """Return `density` rounded up to a multiple of 2**-32: the probability with which an element is kept."""
    return math.ceil(density * _DRAWS) / _DRAWS


def draw_kept(
    start: int,
    count: int,
    num_tasks: int,
    density: float,
    generator: CounterGenerator,
    *,
    is_compiled: bool = False,
) -> UInt8[np.ndarray, "count bytes"]:
    """Draw which elements are kept for which tasks: a bit each, eight tasks in a byte, the first one lowest.

    Args:
        start: Index of the first element in its tensor.
        count: Elements to draw for.
        num_tasks: Number of tasks; what is in the other bits of the last byte means nothing.
        density: Probability of keeping an element, above 0 and up to 1, as `probability` rounds it.
        generator: The tensor's.
        is_compiled: Use a compiled loop.
    """
    most = np.uint32(probability(density) * _DRAWS - 1)
    pairs = range((num_tasks + 1) // 2)
    kept = np.zeros(((num_tasks + 7) // 8, count), dtype=np.uint8)
    if is_compiled:
        streams = np.array([generator.constants(DARE + pair) for pair in pairs])
        cache.drop(start, streams, most, kept)
        return kept.T
    indices = np.arange(start, start + count, dtype=np.int64)
    for pair in pairs:
        keys = generator.keys(indices, DARE + pair).view(np.uint64)
        halves = keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)
        for task, drawn in enumerate(halves, 2 * pair):
            kept[task // 8] |= (drawn <= most).view(np.uint8) << np.uint8(task % 8)
    return kept.T


def dropped_sum(
    rows: Rows, kept: UInt8[torch.Tensor, "chunk bytes"], multipliers: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return Σ m_t τ_t over the tasks that keep the element; the m_t hold the rescaling."""
    return weighted_sum(_masked(rows, kept), multipliers)


def dropped_ties(
    rows: Rows, kept: UInt8[torch.Tensor, "chunk bytes"], shares: Weights, weights: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return the `elected_mean` over the tasks that keep the element; the shares hold the rescaling.

    Elements that were rescaled each by itself, and rounded, would no longer cancel where the masses of both
    signs are equal.
    """
    return elected_mean(_masked(rows, kept), weights, shares)


def _masked(rows: Rows, kept: UInt8[torch.Tensor, "chunk bytes"]) -> list[torch.Tensor]:
    is_kept = [(kept[:, task // 8] & (1 << task % 8)).bool() for task in range(len(rows))]
    return [torch.where(keep, row, 0.0) for keep, row in zip(is_kept, rows, strict=True)]
