"""Inner products of a tensor's vectors, the base model's values and the task vectors, block by block.

A product of two float32 numbers is exact in float64, so only sums are rounded, and their order is fixed. A
tensor is cut into blocks of `BLOCK` elements from its first one on; a block is `GROUPS` groups of `ROWS` rows
of `LANES` elements. The rows of a group are added one after the other; then the upper half of the groups is
added to the lower one until one is left, and so are the lanes. Elements after a tensor's last one count as
zeros, which change no sum. `total` adds blocks and rounds once. So chunks, threads and backends cannot change
a bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Float64

#: An array of NumPy, or of torch on any device.
Array = Any

#: A block's elements: groups of rows of lanes.
GROUPS, ROWS, LANES = 16, 64, 16
BLOCK = GROUPS * ROWS * LANES


def num_pairs(num_vectors: int) -> int:
    """Return the number of inner products of some vectors, each with itself and with every later one."""
    return num_vectors * (num_vectors + 1) // 2


def in_blocks(vectors: Array, zeros: Callable[[tuple[int, int]], Array]) -> Array:
    """Return vectors, "vectors elements", as `block_sums` takes them: "vectors rows groups lanes".

    Zeros follow the last elements. Of less than a block there are only as many groups and rows as it takes.

    Args:
        vectors: Of NumPy or torch, from the first element of a block on.
        zeros: Returns zeros in float64 of that shape, where the vectors are.
    """
    num_vectors, size = vectors.shape
    num_rows = min(ROWS, -(-size // LANES))
    num_groups = -(-size // (ROWS * LANES))
    whole = GROUPS if size > BLOCK else 1 << (num_groups - 1).bit_length()
    num_groups = -(-num_groups // whole) * whole
    padded = zeros((num_vectors, num_groups * num_rows * LANES))
    padded[:, :size] = vectors
    return padded.reshape(num_vectors, num_groups, num_rows, LANES).swapaxes(1, 2)


def block_sums(rows: Array) -> list[Array]:
    """Return the inner products of some blocks: for each vector "itself and every later one, blocks".

    Args:
        rows: What `in_blocks` returns, as an array of NumPy, or of torch on any device.
    """
    sums = []
    for number, row in enumerate(rows):
        others = rows[number:]
        found = row[0] * others[:, 0] + 0.0  # a sum that begins with zero is never a negative zero
        for place in range(1, len(row)):
            found = found + row[place] * others[:, place]
        found = found.reshape(len(others), -1, min(GROUPS, found.shape[1]), LANES)
        sums.append(_folded(_folded(found, 2), 3)[:, :, 0, 0])
    return sums


def _folded(values: Array, axis: int) -> Array:
    """Add the upper half along an axis to the lower one until one is left."""
    while (size := values.shape[axis]) > 1:
        before = (slice(None),) * axis
        values = values[*before, : size // 2] + values[*before, size // 2 :]
    return values


def total(
    parts: Iterable[Float64[np.ndarray, "pairs blocks"]], num_vectors: int
) -> Float64[np.ndarray, "vectors vectors"]:
    """Return the inner products of a whole tensor: the sums of all blocks, each rounded once.

    Args:
        parts: Of some blocks each, in any order.
        num_vectors: Of which `parts` have the pairs.
    """
    sums = np.concatenate([np.zeros((num_pairs(num_vectors), 0)), *parts], axis=1)
    upper = np.zeros((num_vectors, num_vectors))
    upper[np.triu_indices(num_vectors)] = [math.fsum(blocks) for blocks in sums.tolist()]
    return upper + np.triu(upper, 1).T
