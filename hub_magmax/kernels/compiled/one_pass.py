"""Loops that look at a chunk and merge it, a block at a time: what is read stays in the second cache.

A chunk is too large for it: merging one that was looked at before took as long as reading it again, measured.
"""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# ruff: noqa: PLR0913, PLR0917

from __future__ import annotations

import numpy as np

from hub_magmax.kernels.compiled.bits import find
from hub_magmax.kernels.compiled.cache import BLOCK
from hub_magmax.kernels.compiled.jit import compiled
from hub_magmax.kernels.compiled.merge import largest_difference, merge_chunk, read_all
from hub_magmax.kernels.compiled.winners import count_magnitudes, settle


@compiled
def _keep_open(found, begin, first, stored, facts, places, rows):
    """Keep the columns of `stored` that `found` names, counted from `begin`; column 0 is at `first`."""
    kept = facts[0]
    for n in range(found.shape[0]):
        places[kept + n] = first + begin + found[n]
    for row in range(stored.shape[0]):
        for n in range(found.shape[0]):
            rows[row, kept + n] = stored[row, begin + found[n]]
    facts[0] += found.shape[0]


@compiled
def count_and_merge(
    descriptors, places, spent, offset, stored, flat,
    num_ranks, bounds, edges, bins, most, least, outside, opened, near, marks, given,
    kind, per_task, scaling, out, counts, scratch, chosen,
    facts, open_places, open_rows,
):  # fmt: skip
    """Count magnitudes as `count_magnitudes` does, merge as `merge_chunk` does, and keep what is open.

    Args:
        descriptors, places, spent, offset, stored: As for `merge_chunk`, which reads what is merged.
        flat: The same memory as `stored`, row after row.
        num_ranks, bounds, edges, bins, most, least, outside, opened, near, marks: As for
            `count_magnitudes`, where `near` is called places; magnitudes in `opened` are open.
        given, kind, per_task, scaling, out, counts, scratch, chosen: As for `merge_chunk`, where the last is
            called winners.
        facts: int64, two numbers: how many elements are open, added to, and the largest bits merged, raised.
        open_places: int64 per element, takes the places of open elements.
        open_rows: Takes what is stored of them, in rows as long as that.

    Returns:
        The largest bits of a magnitude, or -1 where not all could be read.
    """
    held, largest = stored.shape[1], np.int64(0)
    for start in range(0, out.shape[0], held):
        size = min(held, out.shape[0] - start)
        if not read_all(descriptors, places, offset + start * stored.itemsize, size, stored, spent):
            return np.int64(-1)
        part = opened[start : start + size]
        part[:] = 0
        met = count_magnitudes(
            flat[held:], held, flat[:held], size,
            num_ranks, bounds, edges, bins, most, least, outside, part, near, marks,
        )  # fmt: skip
        largest = max(largest, met)
        met = merge_chunk(
            kind, descriptors[:0], places[:0], spent, 0, stored, per_task, given,
            scaling, out[start : start + size], counts, scratch, chosen,
        )  # fmt: skip
        facts[1] = max(facts[1], met)
        for begin in range(0, size, BLOCK):
            number = find(part[begin : begin + BLOCK], np.uint8(1), near)
            _keep_open(near[:number], begin, start, stored, facts, open_places, open_rows)
    return largest


@compiled
def settle_and_merge(
    descriptors, places, spent, offset, stored, flat,
    active, bonuses, scale, box, slots, codes, examples,
    owner, tally, noted, single, kept, marks, opened, near, distances, found, tasks,
    scaling, out, counts,
    facts, open_places, open_rows,
):  # fmt: skip
    """Write winners as `settle` does, merge by them, and keep what has no winner yet.

    Args:
        descriptors, places, spent, offset, stored: As for `merge_chunk`, which reads what is merged.
        flat: The same memory as `stored`, row after row.
        active, bonuses, scale, box, slots, codes, examples, owner, tally, noted, single, kept, marks,
            opened, near, distances, found, tasks: As for `settle`, where `tally` is called counts and `noted`
            facts; `opened` takes those among as many elements as are read at a time.
        scaling, out, counts: As for `merge_chunk`.
        facts, open_places, open_rows: As for `count_and_merge`.

    Returns:
        How many belong to nobody, or -1 where not all could be read.
    """
    held, number = stored.shape[1], np.int64(0)
    for task in range(active.shape[0]):
        counts[active[task]] -= tally[task]
    for start in range(0, out.shape[0], held):
        size = min(held, out.shape[0] - start)
        stop = start + size
        if not read_all(descriptors, places, offset + start * stored.itemsize, size, stored, spent):
            return np.int64(-1)
        more = settle(
            flat[held:], held, flat[:held], active, bonuses, scale, box, slots, codes, examples,
            owner[start:stop], tally, noted, single[number:], kept[number:], marks, opened, near,
            distances, found, scaling, out[start:stop], tasks[start:stop],
        )  # fmt: skip
        for n in range(number, number + more):
            single[n] += start
        number += more
        facts[1] = max(facts[1], noted[3])
        if active.shape[0] < stored.shape[0] - 1:
            facts[1] = max(facts[1], largest_difference(stored, 0, size))
        _keep_open(opened[: noted[2]], 0, start, stored, facts, open_places, open_rows)
    for task in range(active.shape[0]):
        counts[active[task]] += tally[task]
    return number
