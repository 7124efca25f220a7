"""Counter-based random numbers of compiled loops: keys, draws of owners, mixes of tasks, DARE masks."""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from hub_magmax.kernels.compiled.bits import find
from hub_magmax.kernels.compiled.cache import BLOCK, LANES, MIX_BITS
from hub_magmax.kernels.compiled.simd import (
    as_numbers,
    choose,
    compiled,
    highest_bits,
    inlined,
    ints,
    load,
    longs,
    lower,
    steps,
    store,
)

_INCREMENT = np.int64(0x9E3779B97F4A7C15 - 2**64)

_MULTIPLY_FIRST = np.int64(0xBF58476D1CE4E5B9 - 2**64)

_MULTIPLY_SECOND = np.int64(0x94D049BB133111EB - 2**64)


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
def _draw(owner, codes, start, number, draw, marks, near):
    """Give those of sixteen elements away that `draw` gives, and mark those up to `high`."""
    keys, holder = _keys(start, draw.before, draw.middle), load(owner, start, number)
    is_held, is_given = holder == ints(draw.value), keys < longs(draw.low)
    heir = highest_bits(load(codes, start, number) & ints(draw.mask)) + ints(draw.mark)
    store(owner, start, number, choose(is_held & is_given, heir, holder))
    between = choose(is_given, ints(0), as_numbers(keys <= longs(draw.high)))
    store(marks, near, number, choose(is_held, between, ints(0)))


@compiled
def draw(owner, codes, what, places, found, marks):
    """Give elements of small keys to their heirs, and collect those of keys up to `high`.

    Keys are drawn for all elements: .3 ns for each, where finding those of the owner first takes 2 to 5 for
    each that is found.

    Args:
        owner: uint8 per element, changed.
        codes: As `rank` writes them.
        what: `Draw`.
        places: int64, takes the elements between `low` and `high`.
        found, marks: Scratch: int64, `BLOCK` + `SPARE`, and uint8, `BLOCK`.

    Returns:
        How many lie between, which may be more than there is place for.
    """
    between = np.int64(0)
    for first in range(0, owner.shape[0], BLOCK):
        size = min(BLOCK, owner.shape[0] - first)
        whole = size // LANES * LANES
        for near in range(0, whole, LANES):
            _draw(owner, codes, first + near, None, what, marks, near)
        if whole < size:
            _draw(owner, codes, first + whole, size - whole, what, marks, whole)
        number = find(marks[:size], np.uint8(1), found)
        for k in range(min(number, places.shape[0] - between)):
            places[between + k] = first + found[k]
        between += number
    return between


@compiled
def write_keys(start, before, middle, keys):
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
        write_keys(start + first, before, middle, keys)
        _look_up(keys, shift, table, part)
        for n in range(find(part, np.uint8(255), found)):
            part[found[n]] = _name(keys[found[n]], edges, names)
    return np.int64(0)


@inlined
def _drop(start, begin, number, streams, most, kept):
    """Write the bits of sixteen elements, row after row."""
    for row in range(kept.shape[0]):
        found = ints(0)
        for pair in range(4 * row, min(4 * row + 4, streams.shape[0])):
            keys = _keys(start + begin, streams[pair, 0], streams[pair, 1])
            bit, first, other = 1 << pair % 4 * 2, ints(most[2 * pair]), ints(most[2 * pair + 1])
            found = found | choose(_unsigned(lower(keys)) <= _unsigned(first), ints(bit), ints(0))
            upper = _unsigned(lower(keys >> longs(32)))
            found = found | choose(upper <= _unsigned(other), ints(2 * bit), ints(0))
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
        most: uint32, two for each pair of tasks: an element is kept for the first one if the lower half of
            its key is at most the first number, and for the other if the upper half is at most the other one.
        kept: uint8, elements in its columns.
    """
    size = kept.shape[1]
    whole = size // LANES * LANES
    for begin in range(0, whole, LANES):
        _drop(start, begin, None, streams, most, kept)
    if whole < size:
        _drop(start, whole, size - whole, streams, most, kept)
    return np.int64(0)
