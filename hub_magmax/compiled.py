"""The elementwise passes as machine code: what `kernels` and `selection` do, one cached block at a time.

Compiled by numba where a merge is large enough to be worth it; `loops` keeps and calls what comes out, and
the first large merge of a new environment waits some seconds for it. The results are the same to the bit as
without: every operation is rounded alone, in the same order.

Rows are checkpoints or task vectors, one below the other, so that nothing is compiled anew for another number
of tasks. What `loops` calls allocates nothing: `scratch` are numbers that may be overwritten.

How the loops are written decides whether they become vector instructions; measured on five bfloat16
checkpoints and one thread: one short loop per step over a block that stays in the nearest cache (a loop
with two rows in it: 4 times as long); values chosen by arithmetic and stored always (a choice between a new
value and the old one becomes a masked store: 5 times); every integer cast back to 32 bits (else 64: twice).
"""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# ruff: noqa: PLR0913, PLR0917

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int32, int64, njit, types

from hub_magmax.loops import AGREEING, BAND, BLOCK, DROPPED, DROPPED_TIES, LARGEST, TIES

_compiled: Any = njit(nogil=True, error_model="numpy")

# Of the C library; addresses are passed as numbers.
_pread: Any = types.ExternalFunction("pread", int64(int32, int64, int64, int64))
_clock_gettime: Any = types.ExternalFunction("clock_gettime", int32(int32, int64))

_MAGNITUDE = np.uint32(0x7FFFFFFF)
#: For comparisons: vectors of signed integers have them.
_MAGNITUDE_SIGNED = np.int32(0x7FFFFFFF)
#: What leaves elements of the task vectors out.
_SPARSE = (TIES, BAND, DROPPED, DROPPED_TIES)


@_compiled
def widen(stored, shift, floats):
    """Turn stored bits into float32: bfloat16 is its upper half, and float32 itself."""
    for i in range(stored.shape[0]):
        floats[i] = np.uint32(np.uint32(stored[i]) << shift).view(np.float32)


@_compiled
def _difference(stored, shift, base, row):
    """Widen, subtract the base model, and return the largest magnitude as bits."""
    largest = np.uint32(0)
    for i in range(row.shape[0]):
        moved = np.float32(np.uint32(np.uint32(stored[i]) << shift).view(np.float32) - base[i])
        row[i] = moved
        largest = max(largest, np.uint32(moved.view(np.uint32) & _MAGNITUDE))
    return largest


@_compiled
def _finish(merged, base, scaling, shift, out):
    """Scale, add to the base model, round once, and return the largest magnitude of it as bits.

    bfloat16 is rounded to nearest even, float32 not at all. An update of zero keeps the base model's bits.
    """
    half = np.uint32(0x7FFF) if shift else np.uint32(0)
    lowest = np.uint32(1) if shift else np.uint32(0)
    largest = np.uint32(0)
    for i in range(out.shape[0]):
        update = np.float32(merged[i] * scaling)
        moved = np.float32(base[i] if update == 0 else base[i] + update)
        bits = moved.view(np.uint32)
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & lowest)
        rounded = np.uint32(np.uint32(bits + half) + odd)
        out[i] = np.uint32(rounded >> shift)
        largest = max(largest, np.uint32(rounded & _MAGNITUDE))
    return largest


@_compiled
def _add(row, weight, total):
    for i in range(total.shape[0]):
        total[i] = total[i] + row[i] * weight


@_compiled
def _add_magnitude(row, weight, total):
    for i in range(total.shape[0]):
        total[i] = total[i] + abs(row[i]) * weight


@_compiled
def _weighted_sum(rows, weights, total):
    size = total.shape[0]
    total[:] = np.float32(-0.0)
    for task in range(rows.shape[0]):
        if weights[task] != 0:
            _add(rows[task, :size], weights[task], total)


@_compiled
def _agreeing_sum(rows, weights, found, total, mass):
    size = total.shape[0]
    _weighted_sum(rows, weights, total)
    mass[:] = np.float32(-0.0)
    for task in range(rows.shape[0]):
        if weights[task] != 0:
            _add_magnitude(rows[task, :size], weights[task], mass)
    _scale_by_agreement(total, mass, found)


@_compiled
def _scale_by_agreement(total, mass, found):
    for i in range(total.shape[0]):
        scaled = total[i] * (abs(total[i]) / mass[i])
        found[i] = scaled if mass[i] > 0 else total[i]


@_compiled
def _trim(row, least, trimmed):
    for i in range(trimmed.shape[0]):
        trimmed[i] = row[i] if abs(row[i]) >= least else np.float32(0.0)


@_compiled
def _trim_both(row, least, most, trimmed):
    for i in range(trimmed.shape[0]):
        magnitude = abs(row[i])
        trimmed[i] = row[i] if (magnitude >= least) & (magnitude <= most) else np.float32(0.0)


@_compiled
def _mask(row, kept, bit, masked):
    for i in range(masked.shape[0]):
        masked[i] = row[i] if kept[i] & bit else np.float32(0.0)


@_compiled
def _sparsify(kind, task, row, per_task, kept, found):
    """Set what a rule leaves out of a task vector to zero; `kept` are its bits of this block."""
    if kind == TIES:
        _trim(row, per_task[0, task], found)
    elif kind == BAND:
        _trim_both(row, per_task[0, task], per_task[1, task], found)
    else:
        bit = np.uint8(np.uint8(1) << np.uint8(task % 8))
        _mask(row, kept[task // 8], bit, found)


@_compiled
def _add_agreeing(row, weight, share, elected, total, mass):
    zero = np.float32(0.0)
    for i in range(total.shape[0]):
        agrees = ((row[i] > 0) & (elected[i] > 0)) | ((row[i] < 0) & (elected[i] < 0))
        total[i] = total[i] + (row[i] * weight if agrees else zero)
        mass[i] = mass[i] + (share if agrees else zero)


@_compiled
def _divide(total, mass, found):
    for i in range(total.shape[0]):
        mean = total[i] / mass[i]
        found[i] = mean if mass[i] > 0 else np.float32(0.0)


@_compiled
def _elected_mean(rows, weights, shares, found, spare):
    size = found.shape[0]
    total, mass, elected = spare[0, :size], spare[1, :size], spare[2, :size]
    _weighted_sum(rows, weights, elected)
    total[:] = np.float32(0.0)
    mass[:] = np.float32(0.0)
    for task in range(rows.shape[0]):
        _add_agreeing(rows[task, :size], weights[task], shares[task], elected, total, mass)
    _divide(total, mass, found)


@_compiled
def _add_up(kind, rows, per_task, found, spare):
    size, weights = found.shape[0], per_task[per_task.shape[0] - 1]
    if kind == AGREEING:
        _agreeing_sum(rows, weights, found, spare[0, :size], spare[1, :size])
    elif kind == TIES:
        _elected_mean(rows, weights, weights, found, spare)
    elif kind == DROPPED_TIES:
        _elected_mean(rows, weights, per_task[0], found, spare)
    else:
        _weighted_sum(rows, weights, found)


@_compiled
def _win(row, task, best, winners):
    """Let a task win where its magnitude reaches the best so far. Tasks come in order."""
    for i in range(winners.shape[0]):
        magnitude = np.int32(np.float32(row[i]).view(np.int32) & _MAGNITUDE_SIGNED)
        so_far = best[i]
        best[i] = max(magnitude, so_far)
        winners[i] = max(winners[i], task if magnitude >= so_far else np.int32(0))


@_compiled
def _largest(rows, best, winners):
    size = winners.shape[0]
    best[:] = 0
    winners[:] = 0
    for task in range(rows.shape[0]):
        _win(rows[task, :size], np.int32(task), best, winners)


@_compiled
def _take(rows, winners, found):
    for i in range(found.shape[0]):
        found[i] = rows[winners[i], i]


@_compiled
def copy(values, copied):
    """Copy numbers, cast to another type."""
    for i in range(copied.shape[0]):
        copied[i] = values[i]


@_compiled
def _count(winners, task):
    count = np.uint32(0)
    for i in range(winners.shape[0]):
        count = np.uint32(count + np.uint32(winners[i] == task))
    return count


@_compiled
def _choose(kind, rows, given, best, winners, counts):
    if kind == LARGEST:
        _largest(rows, best, winners)
    else:
        copy(given[0], winners)
    for task in range(rows.shape[0]):
        counts[task] += _count(winners, np.int32(task))


@_compiled
def _now(spent):
    """Return nanoseconds of the clock whose number comes first; the last two elements are overwritten."""
    _clock_gettime(np.int32(spent[0]), spent[2:].ctypes.data)
    return spent[2] * 1_000_000_000 + spent[3]


@_compiled
def _read(descriptor, place, row):
    done, size = 0, row.size * row.itemsize
    while done < size:
        count = _pread(descriptor, row.ctypes.data + done, size - done, place + done)
        if count <= 0:
            return False
        done += count
    return True


@_compiled
def read_all(descriptors, places, offset, size, rows, spent):
    """Fill the first `size` columns of rows, `offset` bytes after `places`; return whether all is there."""
    before = _now(spent)
    complete = True
    for row in range(rows.shape[0]):
        complete = complete and _read(descriptors[row], places[row] + offset, rows[row, :size])
    spent[1] += _now(spent) - before
    return complete


@_compiled
def read_rows(descriptors, places, spent, offsets, lengths, rows):
    """Fill rows from files, one part after the other; return 0, or -1 where not all could be read.

    Args:
        descriptors: int32, of the open file of each row.
        places: int64, the byte of the file at which the tensor of each row begins.
        spent: int64, 4: the number of a clock, nanoseconds that are added to, and two to be overwritten.
        offsets: int64, the bytes from there to each part.
        lengths: int64, the bytes of each part.
        rows: uint8.
    """
    first = 0
    for part in range(offsets.shape[0]):
        length = lengths[part]
        if not read_all(descriptors, places, offsets[part], length, rows[:, first : first + length], spent):
            return np.int64(-1)
        first += length
    return np.int64(0)


@_compiled
def merge_chunk(
    kind, descriptors, places, spent, offset, stored, per_task, given, scaling, out, counts, scratch, whole
):
    """Merge one chunk into `out`, add up the elements of each task, and return the largest bits met.

    Returns -1 where not all of the files could be read.

    Args:
        kind: One of the constants above.
        descriptors, places, spent: As for `read_rows`; empty where `stored` holds all of the chunk.
        offset: Bytes from `places` to the chunk.
        stored: A row of bits per checkpoint, the base model's first: float32 as uint32, bfloat16 as uint16.
            For what is read from files: memory for as much as is read at a time.
        per_task: float32, tasks in its columns. The last row holds weights; before it `TIES` has thresholds,
            `BAND` the least and the largest magnitudes, `DROPPED_TIES` shares. `LARGEST` and `GIVEN` have no
            rows.
        given: uint8, elements in its columns: winners for `GIVEN`, what is kept as `drop` writes it for
            `DROPPED` and `DROPPED_TIES`; else no rows.
        scaling: Scaling coefficient, float32.
        out: Merged elements as bits, of the same dtype.
        counts: int64 per task; changed for `LARGEST` and `GIVEN`.
        scratch: float32, tasks + 6 rows of `BLOCK`.
        whole: int32, 2 rows of `BLOCK`.
    """
    num_tasks, num_elements, held = stored.shape[0] - 1, out.shape[0], stored.shape[1]
    shift = np.uint32(32 - 8 * stored.itemsize)
    rows, spare = scratch[:num_tasks], scratch[num_tasks + 2 :]
    bases, merged = scratch[num_tasks], scratch[num_tasks + 1]
    largest = np.uint32(0)
    for start in range(0, num_elements, BLOCK):
        size = min(BLOCK, num_elements - start)
        stop = start + size
        first = start % held
        last = first + size
        if descriptors.shape[0] > 0 and first == 0:
            wanted = min(held, num_elements - start)
            if not read_all(descriptors, places, offset + start * stored.itemsize, wanted, stored, spent):
                return np.int64(-1)
        base, found, winners = bases[:size], merged[:size], whole[0, :size]
        widen(stored[0, first:last], shift, base)
        for task in range(num_tasks):
            row = rows[task, :size]
            # Not in place: that becomes a masked store.
            vector = spare[3, :size] if kind in _SPARSE else row
            moved = _difference(stored[task + 1, first:last], shift, base, vector)
            largest = max(largest, moved)
            if kind in _SPARSE:
                _sparsify(kind, task, vector, per_task, given[:, start:stop], row)
        if kind < LARGEST:
            _add_up(kind, rows, per_task, found, spare)
        else:
            _choose(kind, rows, given[:, start:stop], whole[1, :size], winners, counts)
            _take(rows, winners, found)
        largest = max(largest, _finish(found, base, scaling, shift, out[start:stop]))
    return np.int64(largest)


@_compiled
def task_vectors(stored, rows, scratch):
    """Subtract the first row of bits from each other one, into float32 `rows`; return the largest bits.

    `scratch`: float32, `BLOCK`.
    """
    num_tasks, num_elements = rows.shape
    shift = np.uint32(32 - 8 * stored.itemsize)
    largest = np.uint32(0)
    for start in range(0, num_elements, BLOCK):
        stop = min(start + BLOCK, num_elements)
        base = scratch[: stop - start]
        widen(stored[0, start:stop], shift, base)
        for task in range(num_tasks):
            moved = _difference(stored[task + 1, start:stop], shift, base, rows[task, start:stop])
            largest = max(largest, moved)
    return np.int64(largest)
