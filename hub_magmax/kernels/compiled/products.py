"""Inner products of the base model's values and the task vectors by a compiled loop.

The order of sums is that of `kernels.products`.
"""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from hub_magmax.kernels.compiled.cache import LANES, TILE
from hub_magmax.kernels.compiled.merge import read_all
from hub_magmax.kernels.compiled.simd import as_doubles, compiled, doubles, inlined, load_doubles, store
from hub_magmax.kernels.compiled.values import widened
from hub_magmax.kernels.products import BLOCK, GROUPS, ROWS

_GROUP = ROWS * LANES


@inlined
def _widen(stored, start, number, wide, place):
    """Write base model and task vectors of sixteen elements as float64."""
    base = widened(stored, start, number)
    store(wide, place, None, as_doubles(base))
    for row in range(1, stored.shape[0]):
        moved = widened(stored, row * stored.shape[1] + start, number) - base
        store(wide, row * wide.shape[1] + place, None, as_doubles(moved))


@inlined
def _add(wide, first, second, size, sums, at):
    """Add products of two vectors' rows to the sums of a pair, which begin at `at`."""
    found = load_doubles(sums, at)
    for row in range(0, size, LANES):
        found = found + load_doubles(wide, first + row) * load_doubles(wide, second + row)
    store(sums, at, None, found)


@inlined
def _add_four(wide, first, second, size, sums, at):
    """Do the same with one vector and four others, and the sums of four pairs."""
    step = wide.shape[1]
    one, two = load_doubles(sums, at), load_doubles(sums, at + LANES)
    three, four = load_doubles(sums, at + 2 * LANES), load_doubles(sums, at + 3 * LANES)
    for row in range(0, size, LANES):
        same, other = load_doubles(wide, first + row), second + row
        one = one + same * load_doubles(wide, other)
        two = two + same * load_doubles(wide, other + step)
        three = three + same * load_doubles(wide, other + 2 * step)
        four = four + same * load_doubles(wide, other + 3 * step)
    store(sums, at, None, one)
    store(sums, at + LANES, None, two)
    store(sums, at + 2 * LANES, None, three)
    store(sums, at + 3 * LANES, None, four)


@compiled
def _add_tile(wide, size, sums, at):
    """Add products of all pairs of vectors, of `size` elements in rows of sixteen."""
    step = wide.shape[1]
    for first in range(wide.shape[0]):
        second = first
        while second + 4 <= wide.shape[0]:
            _add_four(wide, first * step, second * step, size, sums, at)
            second += 4
            at += 4 * LANES
        while second < wide.shape[0]:
            _add(wide, first * step, second * step, size, sums, at)
            second += 1
            at += LANES


@compiled
def _add_block(stored, first, size, wide, sums):
    """Add products of a block, group by group."""
    for begin in range(0, size, TILE * LANES):
        stop = min(begin + TILE * LANES, size)
        whole = (stop - begin) // LANES * LANES
        for place in range(0, whole, LANES):
            _widen(stored, first + begin + place, None, wide, place)
        if whole < stop - begin:
            _widen(stored, first + begin + whole, stop - begin - whole, wide, whole)
            whole += LANES
        _add_tile(wide, whole, sums, begin // _GROUP * sums.shape[1])


@compiled
def _fold(sums, found, column):
    """Add up the groups and the lanes of each pair, and clear them."""
    size = sums.shape[1]
    half = GROUPS // 2 * size
    while half >= size:
        for place in range(0, half, LANES):
            store(sums, place, None, load_doubles(sums, place) + load_doubles(sums, half + place))
        half //= 2
    for pair in range(size // LANES):
        first, half = pair * LANES, LANES // 2
        while half:
            for lane in range(first, first + half):
                sums[0, lane] += sums[0, lane + half]
            half //= 2
        found[pair, column] = sums[0, first]
    for place in range(0, sums.size, LANES):
        store(sums, place, None, doubles(0.0))


@compiled
def add_products(files, num_elements, wide, sums, found):
    """Write the inner products of a chunk, block by block; return 0, or -1 where not all could be read.

    Args:
        files: `Reading`.
        num_elements: Of the chunk.
        wide: float64, vectors by `TILE` · 16, scratch.
        sums: float64, `GROUPS` by pairs · 16, zeros.
        found: float64, pairs by blocks.
    """
    stored = files.memory
    held = stored.shape[1]
    for start in range(0, num_elements, BLOCK):
        size, first = min(BLOCK, num_elements - start), start % held
        is_due = files.descriptors.shape[0] > 0 and first == 0
        if is_due and not read_all(files, start, min(held, num_elements - start)):
            return np.int64(-1)
        _add_block(stored, first, size, wide, sums)
        _fold(sums, found, start // BLOCK)
    return np.int64(0)
