"""Loops that survey a chunk and merge it, a block at a time: what is read stays in the second cache.

A chunk is too large for it: merging one that was surveyed before took as long as reading it again, measured.
"""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from hub_magmax.kernels.compiled.bits import count, find
from hub_magmax.kernels.compiled.cache import BLOCK
from hub_magmax.kernels.compiled.histogram import count_magnitudes
from hub_magmax.kernels.compiled.merge import largest_difference, merge_chunk, read_all
from hub_magmax.kernels.compiled.simd import compiled
from hub_magmax.kernels.compiled.top_n import look_block
from hub_magmax.kernels.structures import Bits, Found, Merging, Reading


@compiled
def keep_undecided(found, begin, first, stored, kept):
    """Keep the columns of `stored` that `found` names, counted from `begin`; column 0 is element `first`."""
    number = kept.number[0]
    for n in range(found.shape[0]):
        kept.places[number + n] = first + begin + found[n]
    for row in range(stored.shape[0]):
        for n in range(found.shape[0]):
            kept.rows[row, number + n] = stored[row, begin + found[n]]
    kept.number[0] += found.shape[0]


@compiled
def count_and_merge(files, merging, kept, counted, opened, places, marks):
    """Count magnitudes as `count_magnitudes` does, merge as `merge_chunk` does, and keep what is undecided.

    Args:
        files: `Reading`, of files.
        merging: `Merging`.
        kept: `Undecided`.
        counted, opened, places, marks: As for `count_magnitudes`; magnitudes in `opened` are undecided.

    Returns:
        The largest bits of a magnitude, or -1 where not all could be read.
    """
    memory, largest = files.memory, np.int64(0)
    held = memory.shape[1]
    stored = Bits(files.flat[held:], held, files.flat[:held])
    read = Reading(files.descriptors[:0], files.places[:0], files.spent, 0, memory, files.flat)
    for start in range(0, merging.out.shape[0], held):
        size = min(held, merging.out.shape[0] - start)
        if not read_all(files, start, size):
            return np.int64(-1)
        part = opened[start : start + size]
        part[:] = 0
        largest = max(largest, count_magnitudes(stored, size, counted, part, places, marks))
        met = merge_chunk(read, _part_of_merging(merging, start, start + size))
        kept.largest[0] = max(kept.largest[0], met)
        for begin in range(0, size, BLOCK):
            number = find(part[begin : begin + BLOCK], np.uint8(1), places)
            keep_undecided(places[:number], begin, start, memory, kept)
    return largest


@compiled
def _part_of_merging(merging, start, stop):
    return Merging(
        merging.kind, merging.per_task, merging.per_element, merging.scaling, merging.out[start:stop],
        merging.counts, merging.scratch, merging.winners,
    )  # fmt: skip


@compiled
def look_and_merge(files, merging, kept, contest, found):
    """Look as `look` does at what is read from files, merge it, and keep what is undecided.

    Args:
        files: `Reading`, of files.
        merging: `Merging`, by winners.
        kept: `Undecided`.
        contest, found: As for `look`.

    Returns:
        How many belong to nobody, or -1 where not all could be read.
    """
    memory, num_kept = files.memory, np.int64(0)
    held = memory.shape[1]
    stored = Bits(files.flat[held:], held, files.flat[:held])
    for first in range(0, merging.out.shape[0], held):
        size = min(held, merging.out.shape[0] - first)
        if not read_all(files, first, size):
            return np.int64(-1)
        part, more = _part_of_found(found, first, first + size, num_kept), np.int64(0)
        out = merging.out[first : first + size]
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            number, more = look_block(stored, start, stop, contest, part, merging.scaling, out, more)
            keep_undecided(found.opened[:number], start, first, memory, kept)
            merging.counts[0] -= number
            for row in range(merging.counts.shape[0]):
                merging.counts[row] += count(part.tasks[start:stop], np.uint8(row))
        for n in range(more):
            part.places[n] += first
        num_kept += more
        kept.largest[0] = max(kept.largest[0], found.largest[1])
        if contest.active.shape[0] < memory.shape[0] - 1:
            kept.largest[0] = max(kept.largest[0], largest_difference(memory, 0, size))
    return num_kept


@compiled
def _part_of_found(found, start, stop, kept):
    return Found(
        found.owner[start:stop], found.tasks[start:stop], found.counts, found.largest, found.places[kept:],
        found.values[kept:], found.near, found.grid, found.classes, found.opened,
    )  # fmt: skip
