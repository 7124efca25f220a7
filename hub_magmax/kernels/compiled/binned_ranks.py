"""Elements kept at random by their rank in a row, as a compiled loop that counts in place of sorting.

Magnitudes of a row fall into bins of neighbouring numbers. Those equal to the lower end of their bin share
one rank, so a table by bins has their bounds and factors; zeros are one kind more. Differences of bfloat16
numbers are mostly such: 8 to 12 ns for each, where sorting takes 19. All others are sorted by bins, and then
within them; of float32, where nearly all are others, that takes 35 ns where sorting takes 20, measured.
"""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from hub_magmax.kernels.compiled.cache import LANES
from hub_magmax.kernels.compiled.random import write_keys
from hub_magmax.kernels.compiled.simd import (
    as_bits,
    choose,
    compiled,
    inlined,
    ints,
    larger,
    largest,
    load,
    lower,
    lowest_bit,
    steps,
    store,
)
from hub_magmax.kernels.compiled.values import MAGNITUDE, base_at, magnitude, widened

#: Distance in bits of two magnitudes of which one is 2**8 times the other; smaller ones share a bin.
_OCTAVES = 8 << 23


@compiled
def write_binned_factors(stored, start, streams, most, factors, room, out):
    """Write what the elements of whole rows are multiplied by, 0 where they are not kept.

    Args:
        stored: `Bits`.
        start: Index of the first element in its tensor.
        streams: uint64, a row of two constants for each pair of tasks.
        most, factors: uint32 and float32, tasks by twice the rank.
        room: `Ranking`.
        out: float32, tasks by elements.

    Returns:
        The largest bits of a magnitude.
    """
    length, top = (most.shape[1] + 1) // 2, np.int64(0)
    for begin in range(0, out.shape[1], length):
        for task in range(out.shape[0]):
            if task % 2 == 0:
                write_keys(start + begin, streams[task // 2, 0], streams[task // 2, 1], room.keys)
            top = max(top, _write_bins(stored, task * stored.stride + begin, begin, length, room))
            number, crowd = _rank_bins(most[task], factors[task], room)
            part = out[task, begin : begin + length]
            _keep_binned(task % 2, room, part)
            if number > 0:
                _sort_others(length, number, crowd, room)
                _keep_others(number, task % 2, most[task], factors[task], room, part)
    return top


@compiled
def _write_bins(stored, place, begin, length, room):
    """Write the bin of each element of a row, and count; return the largest bits of a magnitude.

    Args:
        stored: `Bits`.
        place: Of the first element in its rows.
        begin: Of the first element in the chunk.
        length: Elements.
        room: `Ranking`.
    """
    whole, top, over = length // LANES * LANES, ints(0), ints(0)
    for n in range(0, whole, LANES):
        found = magnitude(widened(stored.rows, place + n, None) - base_at(stored.base, begin + n, None))
        top, over = larger(top, found), larger(over, _complement(found))
        store(room.bits, n, None, found)
    if whole < length:
        n, rest = begin + whole, length - whole
        found = magnitude(widened(stored.rows, place + whole, rest) - base_at(stored.base, n, rest))
        top, over = larger(top, found), larger(over, _complement(found))
        store(room.bits, whole, None, found)
    highest, least = largest(top), MAGNITUDE - largest(over)
    _find_bins(min(max(least, highest - _OCTAVES), highest), highest, room)
    for n in range(0, room.counts.shape[0], LANES):
        store(room.counts, n, None, ints(0))
    for n in range(length):
        room.counts[room.bins[n]] += np.uint32(1)
    return np.int64(highest)


@inlined
def _complement(bits):
    """Return numbers that are the larger the smaller the bits are, but 0 for zero."""
    return choose(bits > ints(0), bits ^ ints(MAGNITUDE), ints(0))


@compiled
def _find_bins(lowest, highest, room):
    """Write the bin of each element of a row, as `Ranking` numbers them.

    Args:
        lowest: Bits of the smallest magnitude that is not in the first bin, in which all smaller ones are.
        highest: Of the largest one.
        room: `Ranking`.
    """
    num_bins, shift = room.below.shape[0], 0
    while (highest >> shift) - (lowest >> shift) > num_bins - 2:
        shift += 1
    first, within = (lowest >> shift) - 1, (1 << shift) - 1
    for n in range(0, room.bits.shape[0], LANES):
        found = load(room.bits, n, None)
        place = (found >> ints(shift)) + ints(-first)
        is_above = place > ints(0)
        is_end = is_above & (ints(1) > (found & ints(within)))
        place = choose(is_above, place, ints(0))
        place = choose(is_end, place, place + ints(num_bins + LANES))
        place = choose(found > ints(0), place, lower(steps()) + ints(num_bins))
        store(room.bins, n, None, place)


@compiled
def _rank_bins(most, factors, room):
    """Turn counts of bins into bounds and factors, and those of others into places.

    Args:
        most, factors: As in `write_binned_factors`, of one task.
        room: `Ranking`.

    Returns:
        The number of others, and the most in one bin.
    """
    num_bins, counts = room.below.shape[0], room.counts
    others = num_bins + LANES
    below = np.int64(0)
    for n in range(num_bins, others):
        below += counts[n]
    for n in range(num_bins, others):
        room.bounds[n], room.factors[n] = most[max(below - 1, 0)], factors[max(below - 1, 0)]
    listed, crowd = np.int64(0), np.int64(0)
    for first in range(0, num_bins, LANES):
        held = as_bits(load(counts, first, None) + load(counts, others + first, None) > ints(0))
        while held:
            n = first + lowest_bit(held)
            held &= held - 1
            own, other = np.int64(counts[n]), np.int64(counts[others + n])
            twice = max(2 * (below + listed) + own - 1, 0)
            room.bounds[n], room.factors[n] = most[twice], factors[twice]
            below += own
            room.below[n], counts[others + n] = below, listed
            listed += other
            crowd = max(crowd, other)
    return listed, crowd


@compiled
def _keep_binned(upper, room, out):
    """Write what elements of a row are multiplied by; wrong for those that are at no end of a bin."""
    shift = np.uint64(32 * upper)
    for n in range(out.shape[0]):
        place = room.bins[n]
        drawn = np.uint32(np.uint64(room.keys[n]) >> shift & np.uint64(0xFFFFFFFF))
        out[n] = room.factors[place] if drawn <= room.bounds[place] else np.float32(0)


@compiled
def _sort_others(length, number, crowd, room):
    """Sort the elements of a row that are at no end of a bin.

    Args:
        length: Elements of the row.
        number: Of those.
        crowd: How many there are in a bin at most; so far an element is from its place at most.
        room: `Ranking`.
    """
    others = room.below.shape[0] + LANES
    for first in range(0, length, LANES):
        held = as_bits(load(room.bins, first, None) >= ints(others))
        while held:
            n = first + lowest_bit(held)
            held &= held - 1
            place = room.bins[n]
            room.sorted[room.counts[place]] = np.uint64(room.bits[n]) << np.uint64(32) | np.uint64(n)
            room.counts[place] += np.uint32(1)
    step = np.int64(1)
    while 3 * step + 1 < crowd:  # Shell's method; with few in a bin this is insertion
        step = 3 * step + 1
    while step > 0:
        for k in range(step, number):
            entry, at = room.sorted[k], k
            while at >= step and room.sorted[at - step] > entry:
                room.sorted[at] = room.sorted[at - step]
                at -= step  # type: ignore[assignment]
            room.sorted[at] = entry
        step //= 3


@compiled
def _keep_others(number, upper, most, factors, room, out):
    """Write what elements at no end of a bin are multiplied by."""
    others, shift = room.below.shape[0] + LANES, np.uint64(32 * upper)
    rising, begin = room.sorted, np.int64(0)
    while begin < number:
        end, bits = begin + 1, rising[begin] >> np.uint64(32)
        while end < number and rising[end] >> np.uint64(32) == bits:
            end += 1
        below = room.below[room.bins[rising[begin] & np.uint64(0xFFFFFFFF)] - others]
        # Equal magnitudes share the mean of their places.
        bound, factor = most[2 * below + begin + end - 1], factors[2 * below + begin + end - 1]
        for k in range(begin, end):
            n = rising[k] & np.uint64(0xFFFFFFFF)
            drawn = np.uint32(np.uint64(room.keys[n]) >> shift & np.uint64(0xFFFFFFFF))
            out[n] = factor if drawn <= bound else np.float32(0)
        begin = end
