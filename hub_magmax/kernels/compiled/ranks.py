"""Elements kept at random by their rank in a row, as compiled loops: the arithmetic of `kernels.row_ranks`.

Between the first two loops the entries of each row are sorted, by NumPy, in registers: 2.5 ns for each of
rows of 4096 in the widest ones, 13 in narrower ones, where sorting by digits took 6, measured. What bfloat16
holds has a loop of its own in `binned_ranks`.
"""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from hub_magmax.kernels.compiled.cache import LANES
from hub_magmax.kernels.compiled.random import write_keys
from hub_magmax.kernels.compiled.simd import (
    as_doubles,
    as_floats,
    compiled,
    doubles,
    ints,
    larger,
    largest,
    load,
    store,
)
from hub_magmax.kernels.compiled.values import base_at, magnitude, widened


@compiled
def write_entries(stored, first, start, bits, entries):
    """Write magnitudes as bits above their places in rows, and return the largest bits.

    Args:
        stored: `Bits`.
        first: Place of the task's row in `stored`.
        start: Of the first element of the first row, in the chunk.
        bits: uint32, elements of a row, up to a multiple of sixteen; scratch.
        entries: uint64, rows by elements.
    """
    top, length = ints(0), entries.shape[1]
    whole = length // LANES * LANES
    for row in range(entries.shape[0]):
        begin = start + row * length
        for n in range(0, whole, LANES):
            found = magnitude(
                widened(stored.rows, first + begin + n, None) - base_at(stored.base, begin + n, None)
            )
            top = larger(top, found)
            store(bits, n, None, found)
        if whole < length:
            n, rest = begin + whole, length - whole
            found = magnitude(widened(stored.rows, first + n, rest) - base_at(stored.base, n, rest))
            top = larger(top, found)
            store(bits, whole, None, found)
        for n in range(length):
            entries[row, n] = np.uint64(bits[n]) << np.uint64(32) | np.uint64(n)
    return np.int64(largest(top))


@compiled
def write_factors(entries, start, stream, upper, most, factors, keys, out):
    """Write what the elements of sorted rows are multiplied by, 0 where they are not kept.

    Args:
        entries: uint64, rows by elements: sorted.
        start: Index of the first element in its tensor.
        stream: uint64, its two constants.
        upper: Whether draws are the upper halves of keys.
        most, factors: uint32 and float32, by twice the rank.
        keys: int64, elements of a row, up to a multiple of sixteen; scratch.
        out: float32, elements.
    """
    length, shift = entries.shape[1], np.uint64(32 * upper)
    for row in range(entries.shape[0]):
        write_keys(start + row * length, stream[0], stream[1], keys)
        rising, part, begin = entries[row], out[row * length : (row + 1) * length], 0
        while begin < length:
            end, bits = begin + 1, rising[begin] >> np.uint64(32)
            while end < length and rising[end] >> np.uint64(32) == bits:
                end += 1
            # Equal magnitudes share the mean of their places.
            bound, factor = most[begin + end - 1], factors[begin + end - 1]
            for n in range(begin, end):
                place = rising[n] & np.uint64(0xFFFFFFFF)
                drawn = np.uint32(np.uint64(keys[place]) >> shift & np.uint64(0xFFFFFFFF))
                part[place] = factor if drawn <= bound else np.float32(0)
            begin = end
    return np.int64(0)


@compiled
def write_magnitude_sums(stored, factors, length, lanes, out):
    """Write the sums of the magnitudes of rows, and of these times their factors.

    Args:
        stored: `Bits`.
        factors: float32, tasks by elements.
        length: Elements of a row.
        lanes: float64, sixteen; scratch.
        out: float64, 2 by tasks by rows.
    """
    for task in range(out.shape[1]):
        place, first = task * stored.stride, task * factors.shape[1]
        for row in range(out.shape[2]):
            begin, stop, all_, kept = row * length, (row + 1) * length, doubles(0.0), doubles(0.0)
            whole = begin + length // LANES * LANES
            for n in range(begin, whole, LANES):
                found = abs(widened(stored.rows, place + n, None) - base_at(stored.base, n, None))
                all_ = all_ + as_doubles(found)
                kept = kept + as_doubles(found * as_floats(load(factors, first + n, None)))
            if whole < stop:
                n, rest = whole, stop - whole
                found = abs(widened(stored.rows, place + n, rest) - base_at(stored.base, n, rest))
                all_ = all_ + as_doubles(found)
                kept = kept + as_doubles(found * as_floats(load(factors, first + n, rest)))
            store(lanes, 0, None, all_)
            out[0, task, row] = _sum(lanes)
            store(lanes, 0, None, kept)
            out[1, task, row] = _sum(lanes)
    return np.int64(0)


@compiled
def _sum(lanes):
    total = lanes[0]
    for n in range(1, LANES):
        total += lanes[n]
    return total
