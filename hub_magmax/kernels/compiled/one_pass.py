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
from hub_magmax.kernels.compiled.histogram import count_magnitudes
from hub_magmax.kernels.compiled.jit import compiled
from hub_magmax.kernels.compiled.merge import merge_chunk, read_all


@compiled
def keep_open(found, begin, first, stored, facts, places, rows):
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
            keep_open(near[:number], begin, start, stored, facts, open_places, open_rows)
    return largest
