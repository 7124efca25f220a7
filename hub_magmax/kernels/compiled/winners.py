"""Loops over a whole tensor before it is merged: what `selection` and `kernels` ask of it, as machine code.

Written like those of `compiled`, for the same reasons.
"""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# ruff: noqa: PLR0913, PLR0917

from __future__ import annotations

import numpy as np

from hub_magmax.kernels.compiled.bits import find
from hub_magmax.kernels.compiled.cache import BLOCK, LANES, MIX_BITS
from hub_magmax.kernels.compiled.jit import compiled, inlined
from hub_magmax.kernels.compiled.merge import magnitude, widened
from hub_magmax.kernels.compiled.simd import (
    as_numbers,
    choose,
    floats,
    highest_bits,
    ints,
    larger,
    largest,
    load,
    longs,
    lower,
    steps,
    store,
    total,
)

_INCREMENT = np.int64(0x9E3779B97F4A7C15 - 2**64)
_MULTIPLY_FIRST = np.int64(0xBF58476D1CE4E5B9 - 2**64)
_MULTIPLY_SECOND = np.int64(0x94D049BB133111EB - 2**64)


@inlined
def _base_at(base, start, number):
    """Return the base model's elements, zeros where it is subtracted already."""
    return widened(base, start, number) if base.shape[0] else floats(0.0)


@inlined
def _rank(rows, stride, base, start, number, wanted, owner, codes):
    """Write winners and codes of sixteen elements, and return the largest magnitudes."""
    below = _base_at(base, start, number)
    first, best, best_task, code, top = ints(0), ints(0), ints(1), ints(0), ints(0)
    for task in range(wanted.shape[0]):
        found = ints(0)
        if wanted[task]:
            found = magnitude(widened(rows, task * stride + start, number) - below)
            top = larger(top, found)
        if task == 0:
            first = found
        else:
            best_task = choose(found >= best, ints(task), best_task)
            # The larger of both thresholds: reached only where it rises and reaches task 0.
            code = code | choose(found >= larger(best, first), ints(1 << task), ints(0))
            best = larger(best, found)
    # Where task 0 wins, name it, and in its place the best of the others.
    wins = first > best
    store(owner, start, number, choose(wins, ints(0), best_task))
    store(codes, start, number, choose(wins, ints(1) << best_task | ints(1), code))
    return top


@compiled
def rank(rows, stride, base, wanted, owner, codes):
    """Write winners and codes of a chunk, as `algorithm_one` describes them; return the largest bits met.

    Args:
        rows, stride, base: As `selection.Bits` has them; 2 to 32 tasks.
        wanted: uint8, whether each task has a quota; the others count as zero.
        owner: uint8 per element.
        codes: Unsigned integers with a bit per task.
    """
    top, size = ints(0), owner.shape[0]
    whole = size // LANES * LANES
    for start in range(0, whole, LANES):
        top = larger(top, _rank(rows, stride, base, start, None, wanted, owner, codes))
    if whole < size:
        top = larger(top, _rank(rows, stride, base, whole, size - whole, wanted, owner, codes))
    return np.int64(largest(top))


@inlined
def _keys(start, before, middle):
    """Return the keys that `randomness.CounterGenerator.keys` draws for sixteen elements."""
    first = np.int64(start) * _INCREMENT + np.int64(before)
    mixed = steps() * longs(_INCREMENT) + longs(first)
    mixed = mixed ^ mixed >> longs(30)
    mixed = mixed * longs(_MULTIPLY_FIRST) ^ longs(middle)
    mixed = mixed ^ mixed >> longs(27)
    mixed = mixed * longs(_MULTIPLY_SECOND)
    return mixed ^ mixed >> longs(31)


@inlined
def _draw(owner, codes, start, number, value, mask, mark, before, middle, low, high, marks, near):
    """Give those of sixteen elements away that `draw` gives, and mark those up to `high`."""
    keys, holder = _keys(start, before, middle), load(owner, start, number)
    is_held, is_given = holder == ints(value), keys < longs(low)
    heir = highest_bits(load(codes, start, number) & ints(mask)) + ints(mark)
    store(owner, start, number, choose(is_held & is_given, heir, holder))
    between = choose(is_given, ints(0), as_numbers(keys <= longs(high)))
    store(marks, near, number, choose(is_held, between, ints(0)))


@compiled
def draw(owner, codes, value, mask, mark, before, middle, low, high, places, found, marks):
    """Give the elements of `value` whose keys lie below `low` to their heirs; collect those up to `high`.

    An heir is the highest task in an element's code among those in `mask`, plus `mark`. Keys are drawn for
    all elements: .3 ns for each, where finding those of `value` first takes 2 to 5 for each that is found.

    Args:
        owner: uint8 per element, changed.
        codes: As `rank` writes them.
        places: int64, takes the elements between `low` and `high`.
        found, marks: int64, `BLOCK` + `SPARE`, and uint8, `BLOCK`.

    Returns:
        How many lie between, which may be more than there is place for.
    """
    between = np.int64(0)
    what = value, mask, mark, before, middle, low, high, marks
    for first in range(0, owner.shape[0], BLOCK):
        size = min(BLOCK, owner.shape[0] - first)
        whole = size // LANES * LANES
        for near in range(0, whole, LANES):
            _draw(owner, codes, first + near, None, *what, near)
        if whole < size:
            _draw(owner, codes, first + whole, size - whole, *what, whole)
        number = find(marks[:size], np.uint8(1), found)
        for k in range(min(number, places.shape[0] - between)):
            places[between + k] = first + found[k]
        between += number
    return between


@compiled
def rename(owner, names):
    """Turn every byte into its entry of `names` (uint8, 256)."""
    for i in range(owner.shape[0]):
        owner[i] = names[owner[i]]
    return np.int64(0)


@compiled
def _write_keys(start, before, middle, keys):
    """Write the keys of elements in a row, and of what lies after them up to a multiple of sixteen."""
    for n in range(0, keys.shape[0], LANES):
        store(keys, n, None, _keys(start + n, before, middle))


@compiled
def _look_up(keys, shift, table, owner):
    for i in range(owner.shape[0]):
        owner[i] = table[np.uint64(keys[i]) >> shift]


@compiled
def _name(key, edges, names):
    """Return the name of the part between two edges in which a key lies."""
    place = 0
    for edge in edges:
        place += np.uint64(key) >= edge
    return names[place]


@compiled
def mix(start, before, middle, edges, names, table, owner, scratch):
    """Write a task for each element, drawn by its key: 1.2 ns for each, where edge after edge takes 3.8.

    Args:
        start: Index of the first element.
        before, middle: Constants of the stream.
        edges: The least key, as uint64, of every part but the first, ascending.
        names: uint8, the task of each part.
        table: uint8 for each number that the `MIX_BITS` high bits of a key can be: the task, or 255 where an
            edge lies among these keys.
        owner: uint8 per element.
        scratch: int64, 2 rows of `BLOCK` + `SPARE`.
    """
    shift = np.uint64(64 - MIX_BITS)
    for first in range(0, owner.shape[0], BLOCK):
        part = owner[first : first + BLOCK]
        keys, found = scratch[0, : part.shape[0]], scratch[1]
        _write_keys(start + first, before, middle, keys)
        _look_up(keys, shift, table, part)
        for n in range(find(part, np.uint8(255), found)):
            part[found[n]] = _name(keys[found[n]], edges, names)
    return np.int64(0)


@inlined
def _drop(start, begin, number, streams, most, kept):
    """Write the bits of sixteen elements, row after row; `most` as a signed number less than any by 2**31."""
    for row in range(kept.shape[0]):
        found = ints(0)
        for pair in range(4 * row, min(4 * row + 4, streams.shape[0])):
            keys = _keys(start + begin, streams[pair, 0], streams[pair, 1])
            bit = 1 << pair % 4 * 2
            found = found | choose(_unsigned(lower(keys)) <= most, ints(bit), ints(0))
            found = found | choose(_unsigned(lower(keys >> longs(32))) <= most, ints(2 * bit), ints(0))
        store(kept, row * kept.shape[1] + begin, number, found)


@inlined
def _unsigned(values):
    """Return integers that are compared as if these had no sign."""
    return values + ints(-(2**31))


@compiled
def drop(start, streams, most, kept):
    """Set a bit for every task and element that is kept: for 8 tasks in each row, the first one's lowest.

    Args:
        start: Index of the first element.
        streams: uint64, a row of two constants per pair of tasks.
        most: uint32; an element is kept for the first task of a pair if the lower half of its key is at most
            this, and for the second one if the upper half is.
        kept: uint8, elements in its columns.
    """
    size, bound = kept.shape[1], _unsigned(ints(most))
    whole = size // LANES * LANES
    for begin in range(0, whole, LANES):
        _drop(start, begin, None, streams, bound, kept)
    if whole < size:
        _drop(start, whole, size - whole, streams, bound, kept)
    return np.int64(0)


@compiled
def _magnitude_at(stored, place, base, start):
    """Return the magnitude of one element, which is at one place in `stored` and at another in `base`."""
    shift = np.uint32(32 - 8 * stored.itemsize)
    value = np.uint32(np.uint32(stored[place]) << shift).view(np.float32)
    below = np.float32(0.0)
    if base.shape[0]:
        below = np.uint32(np.uint32(base[start]) << shift).view(np.float32)
    return np.float32(abs(np.float32(value - below)))


@inlined
def _mark(stored, first, base, start, number, bound, marks, near, opened, tally):
    """Mark magnitudes between two bounds, and return what `tally` is with them.

    Args:
        tally: The largest magnitudes, and how many lie above the bounds, at the upper and at the lower one.
            Elements after the first `number` count as zeros.
    """
    found = magnitude(widened(stored, first + start, number) - _base_at(base, start, number))
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
                found = np.float32(_magnitude_at(rows, first + place, base, place)).view(np.int32)
                bin_ = begin + ((found - low) >> shift)
                bins[bin_] += 1
                most[bin_] = max(most[bin_], found - low + 1)
                least[bin_] = max(least[bin_], high - found + 1)
    return met
