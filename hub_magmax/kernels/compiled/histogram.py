"""Histograms of magnitudes by compiled loops."""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# ruff: noqa: PLR0913, PLR0917

from __future__ import annotations

import numpy as np

from hub_magmax.kernels.compiled.bits import find
from hub_magmax.kernels.compiled.cache import BLOCK, LANES
from hub_magmax.kernels.compiled.jit import compiled, inlined
from hub_magmax.kernels.compiled.merge import base_at, magnitude, magnitude_at, widened
from hub_magmax.kernels.compiled.simd import (
    as_numbers,
    ints,
    larger,
    largest,
    load,
    store,
    total,
)


@inlined
def _mark(stored, first, base, start, number, bound, marks, near, opened, tally):
    """Mark magnitudes between two bounds, and return what `tally` is with them.

    Args:
        tally: The largest magnitudes, and how many lie above the bounds, at the upper and at the lower one.
            Elements after the first `number` count as zeros.
    """
    found = magnitude(widened(stored, first + start, number) - base_at(base, start, number))
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
def _mark_block(stored, first, base, start, stop, bound, marks, opened, outside):
    """Mark a block, count what lies outside, and return the largest bits met."""
    tally, size = (ints(0), ints(0), ints(0), ints(0)), stop - start
    whole = size // LANES * LANES
    for near in range(0, whole, LANES):
        tally = _mark(stored, first, base, start + near, None, bound, marks, near, opened, tally)
    if whole < size:
        rest = size - whole
        tally = _mark(stored, first, base, start + whole, rest, bound, marks, whole, opened, tally)
        outside[1] -= (LANES - rest) * (bound[1] == 0)
        outside[2] -= (LANES - rest) * (bound[0] == 0)
    for number in range(3):
        outside[number] += total(tally[number + 1])
    return np.int64(largest(tally[0]))


@compiled
def count_magnitudes(
    rows, stride, base, num_elements, num_ranks, bounds, edges, bins, most, least, outside, opened,
    places, marks,
):  # fmt: skip
    """Add each task's magnitudes between bounds to the bins of histograms; return the largest bits met.

    What equals a bound is only counted: often it is one value of very many elements.

    Args:
        rows, stride, base, num_elements: As `selection.Bits` has them.
        num_ranks: Histograms per task.
        bounds: int32, five numbers per histogram, the first task's first: `low` and `high`, as bits, and
            `shift`: a bin holds 2**shift neighbouring magnitudes, the first one beginning at `low`; and the
            least and the largest magnitude that leaves an element open.
        edges: int64 per histogram and one more, where its bins begin, and where they end.
        bins: int64, changed.
        most, least: int32 per bin, changed: its largest less `low`, `high` less its smallest, plus 1 each.
        outside: int64, three numbers per histogram, added to: how many lie above `high`, at it, and at `low`.
        opened: uint8 per element, or none: set to 1 where a magnitude leaves it open.
        places: int64, `BLOCK` + `SPARE`.
        marks: uint8, `BLOCK`.
    """
    met = np.int64(0)
    for start in range(0, num_elements, BLOCK):
        stop = min(start + BLOCK, num_elements)
        marked = marks[: stop - start]
        for number in range(bounds.shape[0]):
            bound, first, begin = bounds[number], number // num_ranks * stride, edges[number]
            low, high, shift = bound[0], bound[1], bound[2]
            met = max(
                met,
                _mark_block(rows, first, base, start, stop, bound, marked, opened, outside[number]),
            )
            for k in range(find(marked, np.uint8(1), places)):
                place = start + places[k]
                found = np.float32(magnitude_at(rows, first + place, base, place)).view(np.int32)
                bin_ = begin + ((found - low) >> shift)
                bins[bin_] += 1
                most[bin_] = max(most[bin_], found - low + 1)
                least[bin_] = max(least[bin_], high - found + 1)
    return met
