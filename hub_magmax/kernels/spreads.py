"""Spread of task vectors on each element, and sums of squares over the elements on which they differ.

All of it in float64, step by step in a fixed order, so that backends, chunks and threads cannot change a bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64

#: Elements of a block whose squares are added up: rows of lanes. The rows are added one after the other, then
#: the upper half of the lanes to the lower one until one is left.
ROWS, LANES = 1024, 16
BLOCK = ROWS * LANES


def spreads(vectors: Float32[np.ndarray, "tasks chunk"]) -> Float32[np.ndarray, " chunk"]:
    """Return the standard deviation of at least one task's elements around their mean, rounded once."""
    wide = vectors.astype(np.float64)
    mean = _added(wide) / len(wide)
    return np.sqrt(_added([(row - mean) * (row - mean) for row in wide]) / len(wide)).astype(np.float32)


def _added(rows: Float64[np.ndarray, "rows chunk"] | Sequence[np.ndarray]) -> Float64[np.ndarray, " chunk"]:
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


def square_sums(
    vectors: Float32[np.ndarray, "tasks chunk"], spread: Float32[np.ndarray, " chunk"], least: np.float32
) -> Float64[np.ndarray, "tasks blocks"]:
    """Return by task and block the sum of the squares of the elements whose spread is at least `least`.

    Args:
        vectors: From the first element of a block on.
        spread: Of the elements.
        least: 0 for all elements.
    """
    num_blocks = -(-vectors.shape[1] // BLOCK)
    padded = np.zeros((len(vectors), num_blocks * BLOCK))
    padded[:, : vectors.shape[1]] = np.where(spread >= least, vectors, np.float32(0))
    rows = padded.reshape(len(vectors), num_blocks, ROWS, LANES)
    total = np.zeros((len(vectors), num_blocks, LANES))
    for row in range(ROWS):
        total = total + rows[:, :, row] * rows[:, :, row]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]
