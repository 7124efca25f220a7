"""The loop of `selection.top_n` over a tensor, alone and with merging.

Written like those of `compiled`, for the same reasons. Named tuples stand for several arguments.
"""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from hub_magmax.bitmasks import count, find
from hub_magmax.compiled import finish, largest_difference, read_all, widened
from hub_magmax.jit import compiled, inlined
from hub_magmax.lanes import (
    as_doubles,
    as_ints,
    as_numbers,
    choose,
    doubles,
    floats,
    ints,
    larger,
    largest,
    load_doubles,
    longs,
    nearest,
    store,
)
from hub_magmax.loops import BLOCK, FIRST_MARK, LANES, NOBODY

_HASH = np.uint64(0x9E3779B97F4A7C15)


@inlined
def _compare(stored, start, number, contest, found, near, merged):
    """Write winners of sixteen elements, `NOBODY` where the winner depends on the box, and their sets of tasks.

    Returns the largest magnitudes of task vectors and of what was merged.
    """
    base = widened(stored.base, start, number) if stored.base.shape[0] else floats(0.0)
    best, surest, update = doubles(-np.inf), doubles(-np.inf), floats(0.0)
    top, met, winner, taken, off_grid = ints(0), ints(0), ints(0), ints(0), ints(0)
    num_tasks, grid = contest.active.shape[0], found.grid
    for task in range(num_tasks):
        row = contest.active[task]
        moved = widened(stored.rows, row * stored.stride + start, number) - base
        size = abs(moved)
        top = larger(top, as_ints(size))
        exact = as_doubles(size) * doubles(contest.scale)
        value = nearest(exact)
        store(grid, task * LANES, None, value)
        off_grid = choose(exact == value, off_grid, ints(1))
        net, least = value - doubles(contest.bounds[0, task]), value - doubles(contest.bounds[2, task])
        leads = net > best
        best, winner = choose(leads, net, best), choose(leads, ints(task), winner)
        surest = choose(least > surest, least, surest)
        if merged.out.shape[0]:
            update, taken = choose(leads, moved, update), choose(leads, ints(row), taken)
    reached, several, ties = longs(0), ints(0), longs(0)
    for task in range(num_tasks):
        value, bit = load_doubles(grid, task * LANES), longs(np.int64(1) << np.int64(task))
        is_reached = value - doubles(contest.bounds[1, task]) >= surest
        reached = reached + choose(is_reached, bit, longs(0))
        several = several + as_numbers(is_reached)
        ties = ties + choose(value - doubles(contest.bounds[0, task]) == best, bit, longs(0))
    is_open = several > ints(1)
    ties = choose(reached == ties, ties, longs(0))
    store(found.ties, near, number, choose(off_grid > ints(0), longs(0), ties))
    store(found.owner, start, number, choose(is_open, ints(NOBODY), winner))
    if merged.out.shape[0]:
        store(merged.tasks, start, number, choose(is_open, ints(0), taken))
        met = finish(update, base, merged.scaling, merged.out, start, number)
    return top, met


@compiled
def _mark(ties, contest):
    """Return the mark of a class, `NOBODY` if there is none."""
    slot = np.uint64(ties) * _HASH >> np.uint64(64 - contest.slot_bits)
    while contest.sets[slot] != 0:
        if contest.sets[slot] == ties:
            return contest.marks[slot]
        slot = (slot + np.uint64(1)) & np.uint64(contest.sets.shape[0] - 1)
    return np.uint8(NOBODY)


@compiled
def _value(stored, place, start):
    """Return the magnitude of one element."""
    shift = np.uint32(32 - 8 * stored.rows.itemsize)
    value, below = np.uint32(np.uint32(stored.rows[place]) << shift).view(np.float32), np.float32(0.0)
    if stored.base.shape[0]:
        below = np.uint32(np.uint32(stored.base[start]) << shift).view(np.float32)
    return np.float32(abs(np.float32(value - below)))


@compiled
def _look_block(stored, start, stop, contest, found, merged, kept):
    """Look at a block; return how many elements are open, whose places are written, and how many are kept."""
    top, met, size = ints(0), ints(0), stop - start
    whole = size // LANES * LANES
    for near in range(0, whole, LANES):
        seen, made = _compare(stored, start + near, None, contest, found, near, merged)
        top, met = larger(top, seen), larger(met, made)
    if whole < size:
        seen, made = _compare(stored, start + whole, size - whole, contest, found, whole, merged)
        top, met = larger(top, seen), larger(met, made)
    found.largest[0] = max(found.largest[0], np.int64(largest(top)))
    found.largest[1] = max(found.largest[1], np.int64(largest(met)))
    part = found.owner[start:stop]
    for task in range(contest.active.shape[0]):
        found.counts[task] += count(part, np.uint8(task))
    number = find(part, np.uint8(NOBODY), found.opened)
    for n in range(number):
        near = found.opened[n]
        mark = _mark(found.ties[near], contest) if found.ties[near] != 0 else np.uint8(NOBODY)
        part[near] = mark
        found.counts[mark] += 1
        if mark == NOBODY:
            found.places[kept] = start + near
            for task in range(contest.active.shape[0]):
                place = contest.active[task] * stored.stride + start + near
                found.values[kept, task] = _value(stored, place, start + near)
            kept += 1
    return number, kept


@compiled
def look(stored, contest, found, merged):
    """Settle the elements of a chunk whose winner is the same everywhere in a box; collect the others.

    Args:
        stored: `loops.Stored`.
        contest: `loops.Contest`.
        found: `loops.Found`.
        merged: `loops.Merged`, with nothing in `out`: nothing is merged.

    Returns:
        How many belong to nobody.
    """
    kept = np.int64(0)
    for start in range(0, found.owner.shape[0], BLOCK):
        _, kept = _look_block(stored, start, min(start + BLOCK, found.owner.shape[0]), contest, found, merged, kept)
    return kept
