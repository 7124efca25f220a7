"""Loops that look at a chunk and merge it, a block at a time: what is read stays in the second cache.

A chunk is too large for it: merging one that was looked at before took as long as reading it again, measured.
"""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# ruff: noqa: PLR0913, PLR0917

from __future__ import annotations

import numpy as np

from hub_magmax.bitmasks import find
from hub_magmax.compiled import merge_chunk, read_all
from hub_magmax.compiled_rules import count_magnitudes, settle
from hub_magmax.jit import compiled
from hub_magmax.loops import BLOCK, FIRST_MARK


@compiled
def _mark_from(values, least, marks):
    for i in range(marks.shape[0]):
        marks[i] = np.uint8(values[i] >= least)


@compiled
def _keep_open(values, least, first, stored, marks, found, facts, places, rows):
    """Keep the columns of `stored` at which a byte is `least` or more; the first one's place is `first`."""
    for start in range(0, values.shape[0], BLOCK):
        part = values[start : start + BLOCK]
        _mark_from(part, least, marks[: part.shape[0]])
        number = find(marks[: part.shape[0]], np.uint8(1), found)
        kept = facts[0]
        for n in range(number):
            places[kept + n] = first + start + found[n]
        for row in range(stored.shape[0]):
            for n in range(number):
                rows[row, kept + n] = stored[row, start + found[n]]
        facts[0] += number


@compiled
def count_and_merge(
    descriptors, places, spent, offset, stored, flat,
    num_ranks, bounds, edges, bins, most, least, above, opened, near, marks, given,
    kind, per_task, scaling, out, counts, scratch, chosen,
    facts, found, open_places, open_rows,
):  # fmt: skip
    """Count magnitudes as `count_magnitudes` does, merge as `merge_chunk` does, and keep what is open.

    Args:
        descriptors, places, spent, offset, stored: As for `merge_chunk`, which reads what is merged.
        flat: The same memory as `stored`, row after row.
        num_ranks, bounds, edges, bins, most, least, above, opened, near, marks: As for
            `count_magnitudes`, where `near` is called places; magnitudes in `opened` are open.
        given, kind, per_task, scaling, out, counts, scratch, chosen: As for `merge_chunk`, where the last is
            called winners.
        facts: int64, two numbers: how many elements are open, added to, and the largest bits merged, raised.
        found: int64, `BLOCK` + `SPARE`.
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
            num_ranks, bounds, edges, bins, most, least, above, part, near, marks,
        )  # fmt: skip
        largest = max(largest, met)
        met = merge_chunk(
            kind, descriptors[:0], places[:0], spent, 0, stored, per_task, given,
            scaling, out[start : start + size], counts, scratch, chosen,
        )  # fmt: skip
        facts[1] = max(facts[1], met)
        _keep_open(part, np.uint8(1), start, stored, marks, found, facts, open_places, open_rows)
    return largest


@compiled
def settle_and_merge(
    descriptors, places, spent, offset, stored, flat,
    active, bonuses, scale, box, slots, codes, examples,
    owner, tally, noted, single, kept, marks, found, distances,
    names, winners,
    kind, per_task, scaling, out, counts, scratch, chosen,
    facts, open_found, open_places, open_rows,
):  # fmt: skip
    """Write winners as `settle` does, merge by them as `merge_chunk` does, and keep what has no winner yet.

    Args:
        descriptors, places, spent, offset, stored: As for `merge_chunk`, which reads what is merged.
        flat: The same memory as `stored`, row after row.
        active, bonuses, scale, box, slots, codes, examples, owner, tally, noted, single, kept, marks,
            found, distances: As for `settle`, where `tally` is called counts, `noted` facts and `found`
            places.
        names: uint8 for each byte that an owner can be: the task to merge by; of marks, any.
        winners: uint8, one row, elements in its columns: takes these tasks.
        kind, per_task, scaling, out, counts, scratch, chosen: As for `merge_chunk`, where the last is called
            winners.
        facts, open_found, open_places, open_rows: As for `count_and_merge`, where the second is called found.

    Returns:
        How many belong to nobody, or -1 where not all could be read.
    """
    held, number = stored.shape[1], np.int64(0)
    for start in range(0, out.shape[0], held):
        size = min(held, out.shape[0] - start)
        if not read_all(descriptors, places, offset + start * stored.itemsize, size, stored, spent):
            return np.int64(-1)
        part = owner[start : start + size]
        more = settle(
            flat[held:], held, flat[:held], active, bonuses, scale, box, slots, codes, examples,
            part, tally, noted, single[number:], kept[number:], marks, found, distances,
        )  # fmt: skip
        for n in range(number, number + more):
            single[n] += start
        number += more
        for i in range(size):
            winners[0, start + i] = names[part[i]]
        met = merge_chunk(
            kind, descriptors[:0], places[:0], spent, 0, stored, per_task, winners[:, start : start + size],
            scaling, out[start : start + size], counts, scratch, chosen,
        )  # fmt: skip
        facts[1] = max(facts[1], met)
        _keep_open(
            part, np.uint8(FIRST_MARK), start, stored, marks, open_found, facts, open_places, open_rows
        )
    return number
