"""Histograms of magnitudes by compiled loops."""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# ruff: noqa: PLR0913, PLR0917

from __future__ import annotations

import numpy as np

from hub_magmax.kernels.compiled.bits import find
from hub_magmax.kernels.compiled.cache import BLOCK, LANES
from hub_magmax.kernels.compiled.simd import (
    as_numbers,
    compiled,
    inlined,
    ints,
    larger,
    largest,
    load,
    store,
    total,
)
from hub_magmax.kernels.compiled.values import base_at, magnitude, magnitude_at, widened


@inlined
def _mark(stored, first, start, number, bound, marks, near, opened, tally):
    """Mark magnitudes between two bounds, and return `tally` with them added.

    Args:
        tally: The largest magnitudes, and how many lie above the bounds, at the upper and at the lower one.
            Elements after the first `number` count as zeros.
    """
    found = magnitude(widened(stored.rows, first + start, number) - base_at(stored.base, start, number))
    low, high = ints(bound[0]), ints(bound[1])
    store(marks, near, number, as_numbers((found > low) & (found < high)))
    if opened.shape[0] and bound[3] <= bound[4]:
        is_open = as_numbers((found >= ints(bound[3])) & (found <= ints(bound[4])))
        store(opened, start, number, load(opened, start, number) | is_open)
    top, above, at_high, at_low = tally
    return (
        larger(top, found),
        above + as_numbers(found > high),
        at_high + as_numbers(found == high),
        at_low + as_numbers(found == low),
    )


@compiled
def _mark_block(stored, first, start, stop, bound, marks, opened, outside):
    """Mark a block, count what lies outside, and return the largest bits met."""
    tally, size = (ints(0), ints(0), ints(0), ints(0)), stop - start
    whole = size // LANES * LANES
    for near in range(0, whole, LANES):
        tally = _mark(stored, first, start + near, None, bound, marks, near, opened, tally)
    if whole < size:
        rest = size - whole
        tally = _mark(stored, first, start + whole, rest, bound, marks, whole, opened, tally)
        outside[1] -= (LANES - rest) * (bound[1] == 0)
        outside[2] -= (LANES - rest) * (bound[0] == 0)
    for number in range(3):
        outside[number] += total(tally[number + 1])
    return np.int64(largest(tally[0]))


@compiled
def count_magnitudes(stored, num_elements, counted, opened, places, marks):
    """Add each task's magnitudes between bounds to the bins of histograms; return the largest bits met.

    Args:
        stored: `Bits`.
        num_elements: Of the chunk.
        counted: `Histograms`.
        opened: uint8 per element, or none: set to 1 where a magnitude leaves it open.
        places: int64, `BLOCK` + `SPARE`, scratch.
        marks: uint8, `BLOCK`, scratch.
    """
    met = np.int64(0)
    for start in range(0, num_elements, BLOCK):
        stop = min(start + BLOCK, num_elements)
        marked = marks[: stop - start]
        for number in range(counted.bounds.shape[0]):
            bound, first = counted.bounds[number], number // counted.num_ranks * stored.stride
            low, high, shift = bound[0], bound[1], bound[2]
            outside = counted.outside[number]
            met = max(met, _mark_block(stored, first, start, stop, bound, marked, opened, outside))
            for k in range(find(marked, np.uint8(1), places)):
                place = start + places[k]
                found = np.float32(magnitude_at(stored, first + place, place)).view(np.int32)
                bin_ = counted.edges[number] + ((found - low) >> shift)
                counted.bins[bin_] += 1
                counted.most[bin_] = max(counted.most[bin_], found - low + 1)
                counted.least[bin_] = max(counted.least[bin_], high - found + 1)
    return met
