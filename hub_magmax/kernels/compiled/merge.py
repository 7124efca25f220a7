"""Elementwise operations as compiled loops: the arithmetic of `kernels.ops`, sixteen elements at a time.

The results are the same to the bit: every operation is rounded alone, in the same order. numba compiles the
loops where a merge is large enough to be worth it, and `cache` keeps the machine code.

Rows are checkpoints or task vectors, one below the other, so that nothing is compiled anew for another number
of tasks. Loops that `cache` calls allocate nothing. Functions that take `start` and `number` work on sixteen
elements from `start` on, as `simd.load` does.
"""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int32, int64, types

from hub_magmax.kernels.compiled.bits import count
from hub_magmax.kernels.compiled.cache import (
    AFFINE,
    AGREEING,
    BALANCED,
    BLOCK,
    CHOSEN,
    LANES,
    LARGEST,
    STITCHED,
    TIES,
)
from hub_magmax.kernels.compiled.competition import balanced
from hub_magmax.kernels.compiled.elections import elected, kept, stitched
from hub_magmax.kernels.compiled.simd import (
    as_ints,
    choose,
    compiled,
    floats,
    inlined,
    ints,
    larger,
    largest,
    load,
    store,
)
from hub_magmax.kernels.compiled.values import MAGNITUDE, magnitude, widen, widened

# Of the C library; addresses are passed as numbers.
_pread: Any = types.ExternalFunction("pread", int64(int32, int64, int64, int64))
_clock_gettime: Any = types.ExternalFunction("clock_gettime", int32(int32, int64))

#: Bits of 2**127: differences of smaller numbers are finite.
_FAR_BITS = 0x7F000000


@inlined
def finish(merged, base, scaling, out, start, number):
    """Scale, add to the base model, round once, write, and return the magnitudes of it as bits.

    bfloat16 is rounded to nearest even, float32 not at all. An update of zero keeps the base model's bits.
    """
    update = merged * floats(scaling)
    bits = as_ints(choose(update == floats(0.0), base, base + update))
    if out.itemsize == 2:
        bits = bits + ints(0x7FFF) + (bits >> ints(16) & ints(1))
    store(out, start, number, bits >> ints(32 - 8 * out.itemsize))
    return bits & ints(MAGNITUDE)


@inlined
def _sum(merging, stored, start, number, base, place):
    """Return the weighted sum of task vectors, and the largest magnitudes of these."""
    kind, per_task = merging.kind, merging.per_task
    weights, top = per_task.shape[0] - 1, ints(0)
    total, mass = floats(-0.0), floats(-0.0)
    before = per_task.shape[1] - stored.shape[0] + 1
    if kind == AFFINE and per_task[weights, 0] != 0:
        total = total + base * floats(per_task[weights, 0])
    for task in range(stored.shape[0] - 1):
        moved = widened(stored, (task + 1) * stored.shape[1] + start, number) - base
        top = larger(top, magnitude(moved))
        weight = per_task[weights, before + task]
        if weight != 0:
            if kind > AGREEING:
                moved = kept(merging, task, moved, place, number)
            total = total + moved * floats(weight)
            if kind == AGREEING:
                mass = mass + abs(moved) * floats(weight)
    if kind == AGREEING:
        total = choose(mass > floats(0.0), total * (abs(total) / mass), total)
    return total, top


@inlined
def _largest(stored, start, number, base, winners, place):
    """Return what the task with the largest magnitude stores, and the magnitude; the last of several wins."""
    best, taken, winner = ints(0), ints(0), ints(0)
    for task in range(stored.shape[0] - 1):
        bits = load(stored, (task + 1) * stored.shape[1] + start, number)
        found = magnitude(widen(bits, stored.itemsize) - base)
        leads = found >= best
        best = larger(best, found)
        taken = choose(leads, bits, taken)
        winner = choose(leads, ints(task), winner)
    store(winners, place, number, winner)
    return taken, best


@inlined
def _given(stored, start, number, winners, place):
    """Return what winners store, and the largest bits of all rows."""
    winner, taken = load(winners, place, number), ints(0)
    without_sign = ints(MAGNITUDE >> (32 - 8 * stored.itemsize))
    top = load(stored, start, number) & without_sign
    for task in range(stored.shape[0] - 1):
        bits = load(stored, (task + 1) * stored.shape[1] + start, number)
        top = larger(top, bits & without_sign)
        taken = choose(winner == ints(task), bits, taken)
    return taken, top << ints(32 - 8 * stored.itemsize)


@inlined
def _merge(merging, stored, start, number, place, near):
    """Merge sixteen elements or fewer, and return the largest bits met.

    `start`, `place` and `near` are their places in `stored`, in `given` and `out`, and in `winners`.
    """
    kind, base = merging.kind, widened(stored, start, number)
    if kind < TIES:
        merged, top = _sum(merging, stored, start, number, base, place)
    elif kind < STITCHED:
        merged, top = elected(merging, stored, start, number, base, place)
    elif kind == STITCHED:
        merged, top = stitched(merging, stored, start, number, base)
    elif kind == BALANCED:
        merged, top = balanced(merging, stored, start, number, base)
    else:
        if kind == LARGEST:
            bits, top = _largest(stored, start, number, base, merging.winners, near)
        else:
            bits, top = _given(stored, start, number, merging.per_element, place)
        merged = widen(bits, stored.itemsize) - base
        top = larger(top, magnitude(merged))
    return larger(top, finish(merged, base, merging.scaling, merging.out, place, number))


@compiled
def _merge_block(merging, stored, first, size, start):
    """Merge a block, and return the largest bits met."""
    top, whole = ints(0), size // LANES * LANES
    for near in range(0, whole, LANES):
        top = larger(top, _merge(merging, stored, first + near, None, start + near, near))
    if whole < size:
        top = larger(top, _merge(merging, stored, first + whole, size - whole, start + whole, whole))
    return largest(top)


@compiled
def _now(spent):
    """Return nanoseconds of the clock whose number comes first; the last two elements are overwritten."""
    _clock_gettime(np.int32(spent[0]), spent[2:].ctypes.data)
    return spent[2] * 1_000_000_000 + spent[3]


@compiled
def _read(descriptor, place, row):
    done, size = 0, row.size * row.itemsize
    while done < size:
        count = _pread(descriptor, row.ctypes.data + done, size - done, place + done)
        if count <= 0:
            return False
        done += count
    return True


@compiled
def read_all(files, start, size):
    """Fill `size` columns of the memory from element `start` of the chunk on; return whether all is there."""
    before, offset = _now(files.spent), files.offset + start * files.memory.itemsize
    complete = True
    for row in range(files.memory.shape[0]):
        part = files.memory[row, :size]
        complete = complete and _read(files.descriptors[row], files.places[row] + offset, part)
    files.spent[1] += _now(files.spent) - before
    return complete


@compiled
def read_rows(descriptors, places, spent, offsets, lengths, rows):
    """Fill rows from files, one part after the other; return 0, or -1 where not all could be read.

    Args:
        descriptors, places, spent: As in `Reading`.
        offsets: int64, the bytes from there to each part.
        lengths: int64, the bytes of each part.
        rows: uint8.
    """
    first = 0
    for part in range(offsets.shape[0]):
        memory = rows[:, first : first + lengths[part]]
        before, complete = _now(spent), True
        for row in range(rows.shape[0]):
            complete = complete and _read(descriptors[row], places[row] + offsets[part], memory[row])
        spent[1] += _now(spent) - before
        if not complete:
            return np.int64(-1)
        first += lengths[part]
    return np.int64(0)


@compiled
def merge_chunk(files, merging):
    """Merge one chunk, add up the elements of each task, and return the largest bits met.

    Returns -1 where not all of the files could be read.

    Args:
        files: `Reading`.
        merging: `Merging`.
    """
    stored, num_elements, most = files.memory, merging.out.shape[0], np.int64(0)
    held = stored.shape[1]
    for start in range(0, num_elements, BLOCK):
        size, first = min(BLOCK, num_elements - start), start % held
        is_due = files.descriptors.shape[0] > 0 and first == 0
        if is_due and not read_all(files, start, min(held, num_elements - start)):
            return np.int64(-1)
        met = np.int64(_merge_block(merging, stored, first, size, start))
        if merging.kind == CHOSEN and met >= _FAR_BITS:
            met = max(met, largest_difference(stored, first, first + size))
        most = max(most, met)
        for task in range(merging.counts.shape[0] if merging.kind >= LARGEST else 0):
            if merging.kind == LARGEST:
                merging.counts[task] += count(merging.winners[:size], np.uint8(task))
            else:
                merging.counts[task] += count(merging.per_element[0, start : start + size], np.uint8(task))
    return most


@compiled
def largest_difference(stored, start, stop):
    """Return the bits of the largest magnitude in a block of all task vectors."""
    top, whole = ints(0), start + (stop - start) // LANES * LANES
    for row in range(stored.shape[1], stored.size, stored.shape[1]):
        for place in range(start, whole, LANES):
            top = larger(top, magnitude(_moved(stored, row, place, None)))
        if whole < stop:
            top = larger(top, magnitude(_moved(stored, row, whole, stop - whole)))
    return np.int64(largest(top))


@inlined
def _moved(stored, row, start, number):
    """Return elements of the task vector of a row that begins at `row`."""
    return widened(stored, row + start, number) - widened(stored, start, number)


@compiled
def task_vectors(stored, rows):
    """Subtract the first row of bits from each other one, into float32 `rows`; return the largest bits."""
    top, size = ints(0), rows.shape[1]
    whole = size // LANES * LANES
    for task in range(rows.shape[0]):
        for start in range(0, whole, LANES):
            moved = _moved(stored, (task + 1) * size, start, None)
            store(rows, task * size + start, None, as_ints(moved))
            top = larger(top, magnitude(moved))
        if whole < size:
            moved = _moved(stored, (task + 1) * size, whole, size - whole)
            store(rows, task * size + whole, size - whole, as_ints(moved))
            top = larger(top, magnitude(moved))
    return np.int64(largest(top))
