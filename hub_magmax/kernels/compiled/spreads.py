"""The arithmetic of `kernels.spreads` as compiled loops."""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from hub_magmax.kernels.compiled.cache import LANES
from hub_magmax.kernels.compiled.simd import (
    as_doubles,
    as_floats,
    choose,
    compiled,
    doubles,
    floats,
    inlined,
    ints,
    larger,
    largest,
    load,
    narrow,
    square_root,
    store,
)
from hub_magmax.kernels.compiled.values import base_at, magnitude, widened
from hub_magmax.kernels.spreads import BLOCK


@inlined
def _moved(stored, task, start, number, base):
    return widened(stored.rows, task * stored.stride + start, number) - base


@inlined
def _spread(stored, active, start, number):
    """Return the standard deviation of sixteen elements, and the largest magnitudes."""
    base, top = base_at(stored.base, start, number), ints(0)
    count = doubles(np.float64(active.shape[0]))
    total, squares = doubles(-0.0), doubles(-0.0)
    for k in range(active.shape[0]):
        moved = _moved(stored, active[k], start, number, base)
        top = larger(top, magnitude(moved))
        total = total + as_doubles(moved)
    mean = total / count
    for k in range(active.shape[0]):
        away = as_doubles(_moved(stored, active[k], start, number, base)) - mean
        squares = squares + away * away
    return narrow(square_root(squares / count)), top


@compiled
def write_spreads(stored, active, out):
    """Write how far the elements of some tasks differ, and return the largest bits met.

    Args:
        stored: `Bits`.
        active: int64, the tasks.
        out: float32, elements.
    """
    top, size = ints(0), out.shape[0]
    whole = size // LANES * LANES
    for start in range(0, whole, LANES):
        found, met = _spread(stored, active, start, None)
        store(out, start, None, found)
        top = larger(top, met)
    if whole < size:
        found, met = _spread(stored, active, whole, size - whole)
        store(out, whole, size - whole, found)
        top = larger(top, met)
    return np.int64(largest(top))


@inlined
def _square(stored, task, start, number, spread, least):
    moved = _moved(stored, task, start, number, base_at(stored.base, start, number))
    is_selected = as_floats(load(spread, start, number)) >= floats(least)
    wide = as_doubles(choose(is_selected, moved, floats(0.0)))
    return wide * wide


@compiled
def write_square_sums(stored, spread, least, lanes, out):
    """Write the sums of the squares of what has a spread, by task and block.

    Args:
        stored: `Bits`.
        spread: float32, elements.
        least: float32.
        lanes: float64, sixteen; scratch.
        out: float64, tasks by blocks.
    """
    size = spread.shape[0]
    for task in range(out.shape[0]):
        for block in range(out.shape[1]):
            first, stop = block * BLOCK, min((block + 1) * BLOCK, size)
            whole, total = first + (stop - first) // LANES * LANES, doubles(0.0)
            for start in range(first, whole, LANES):
                total = total + _square(stored, task, start, None, spread, least)
            if whole < stop:
                total = total + _square(stored, task, whole, stop - whole, spread, least)
            store(lanes, 0, None, total)
            half = LANES // 2
            while half:
                for n in range(half):
                    lanes[n] = lanes[n] + lanes[n + half]
                half //= 2
            out[task, block] = lanes[0]
    return np.int64(0)
