"""Winners of `top_n` at given prices by compiled loops, and elements near a tie."""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from hub_magmax.kernels.compiled.bits import count, find
from hub_magmax.kernels.compiled.cache import BLOCK, LANES
from hub_magmax.kernels.compiled.merge import finish
from hub_magmax.kernels.compiled.simd import (
    as_doubles,
    as_floats,
    as_ints,
    as_longs,
    as_numbers,
    as_wide,
    choose,
    compiled,
    doubles,
    floats,
    inlined,
    ints,
    larger,
    largest,
    load,
    load_doubles,
    longs,
    nearest,
    smaller,
    store,
)
from hub_magmax.kernels.compiled.values import base_at, magnitude_at, widened
from hub_magmax.kernels.structures import FIRST_MARK, NOBODY

_MULTIPLIER = np.int64(0x9E3779B97F4A7C15 - 2**64)


@inlined
def _lead(stored, start, number, contest, found, scaling, out):
    """Write who is ahead among sixteen elements, and merge; `NOBODY` where another may be ahead in the box.

    Returns the largest magnitudes of task vectors and of what was merged.
    """
    base = base_at(stored.base, start, number)
    best, second, surest, winner, taken = ints(-1), ints(-1), ints(-1), ints(0), ints(0)
    top, met, update = ints(0), ints(0), floats(0.0)
    for task in range(contest.active.shape[0]):
        row = contest.active[task]
        moved = widened(stored.rows, row * stored.stride + start, number) - base
        size = abs(moved)
        top = larger(top, as_ints(size))
        most = as_ints(size + floats(contest.bonuses[0, task]))
        leads = most >= best
        winner, update = choose(leads, ints(task), winner), choose(leads, moved, update)
        taken = choose(leads, ints(row), taken)
        second, best = larger(second, smaller(best, most)), larger(best, most)
        surest = larger(surest, as_ints(size + floats(contest.bonuses[1, task])))
    is_open = surest <= second
    store(found.owner, start, number, choose(is_open, ints(NOBODY), winner))
    if out.shape[0]:
        store(found.tasks, start, number, choose(is_open, ints(0), taken))
        met = finish(update, base, scaling, out, start, number)
    return top, met


@inlined
def _compare(contest, found):
    """Write of sixteen elements in `near` how far each task is below the best, -1 where it is out of reach.

    Their classes are written too: how many tasks are in reach, a code of the distances, 0 where a magnitude
    is not on the grid, and the best task.
    """
    best, surest = doubles(-np.inf), doubles(-np.inf)
    winner, off_grid = ints(0), ints(0)
    for task in range(contest.active.shape[0]):
        exact = as_doubles(as_floats(load(found.near, task * LANES, None))) * doubles(contest.scale)
        value = nearest(exact)
        store(found.grid, task * LANES, None, value)
        off_grid = choose(exact == value, off_grid, ints(1))
        net, least = value - doubles(contest.bounds[0, task]), value - doubles(contest.bounds[2, task])
        leads = net > best
        best, winner = choose(leads, net, best), choose(leads, ints(task), winner)
        surest = choose(least > surest, least, surest)
    code, reached = longs(1), ints(0)
    for task in range(contest.active.shape[0]):
        value = load_doubles(found.grid, task * LANES)
        is_reached = value - doubles(contest.bounds[1, task]) >= surest
        reached = reached + as_numbers(is_reached)
        distance = choose(is_reached, best - (value - doubles(contest.bounds[0, task])), doubles(-1.0))
        store(found.grid, task * LANES, None, distance)
        code = (code ^ as_longs(distance)) * longs(_MULTIPLIER)
        code = code ^ code >> longs(29)
    store(found.classes, 0, None, as_wide(reached))
    store(found.classes, LANES, None, choose(off_grid > ints(0), longs(0), code))
    store(found.classes, 2 * LANES, None, as_wide(winner))


@compiled
def _mark(code, column, contest, found):
    """Return the mark of an element's class, `NOBODY` if there is none."""
    slot = np.uint64(code) & np.uint64(contest.slots.shape[0] - 1)
    while code != 0 and contest.slots[slot] >= 0:
        # Unsigned: an index that may be negative is looked at twice. Without branches it takes half as long.
        number, unlike = np.uint64(contest.slots[slot]), np.uint64(0)
        for task in range(contest.active.shape[0]):
            distance = found.grid[np.uint64(task), column]
            unlike |= np.uint64(contest.examples[number, np.uint64(task)] != distance)
        if unlike == 0:
            return np.uint8(FIRST_MARK + number)
        slot = (slot + np.uint64(1)) & np.uint64(contest.slots.shape[0] - 1)
    return np.uint8(NOBODY)


@inlined
def _gather(stored, start, places, contest, near):
    """Write the magnitudes of up to sixteen elements, each into a column."""
    for column in range(places.shape[0]):
        at = start + places[column]
        for task in range(contest.active.shape[0]):
            near[task, column] = magnitude_at(stored, contest.active[task] * stored.stride + at, at)


@compiled
def _settle(stored, start, places, contest, found, kept):
    """Settle up to sixteen open elements, or give them to a class, or keep them; return how many are kept."""
    _gather(stored, start, places, contest, found.near)
    _compare(contest, found)
    for column in range(places.shape[0]):
        if found.classes[0, column] == 1:
            mark = np.uint8(found.classes[2, column])
        else:
            mark = _mark(found.classes[1, column], np.uint64(column), contest, found)
        found.owner[start + places[column]] = mark
        found.counts[mark] += 1
        if mark == NOBODY:
            found.places[kept] = start + places[column]
            for task in range(contest.active.shape[0]):
                found.values[kept, task] = found.near[task, column]
            kept += 1
    return kept


@compiled
def look_block(stored, start, stop, contest, found, scaling, out, kept):
    """Look at a block; return how many elements are open, whose places are written, and how many are kept."""
    top, met, size = ints(0), ints(0), stop - start
    whole = size // LANES * LANES
    for near in range(0, whole, LANES):
        seen, made = _lead(stored, start + near, None, contest, found, scaling, out)
        top, met = larger(top, seen), larger(met, made)
    if whole < size:
        seen, made = _lead(stored, start + whole, size - whole, contest, found, scaling, out)
        top, met = larger(top, seen), larger(met, made)
    found.largest[0] = max(found.largest[0], np.int64(largest(top)))
    found.largest[1] = max(found.largest[1], np.int64(largest(met)))
    part = found.owner[start:stop]
    for task in range(contest.active.shape[0]):
        found.counts[task] += count(part, np.uint8(task))
    number = find(part, np.uint8(NOBODY), found.opened)
    for n in range(0, number, LANES):
        kept = _settle(stored, start, found.opened[n : min(n + LANES, number)], contest, found, kept)
    return number, kept


@compiled
def look(stored, contest, found, scaling, out):
    """Settle the elements of a chunk whose winner is the same everywhere in a box; collect the others.

    Args:
        stored: `Bits`.
        contest: `Contest`.
        found: `Found`.
        scaling, out: Scaling coefficient, float32, and memory for merged elements as bits, of the dtype of
            the rows; without elements, nothing is merged. Of open elements it takes anything.

    Returns:
        How many belong to nobody.
    """
    kept = np.int64(0)
    for start in range(0, found.owner.shape[0], BLOCK):
        stop = min(start + BLOCK, found.owner.shape[0])
        _, kept = look_block(stored, start, stop, contest, found, scaling, out, kept)
    return kept
