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
from numba import njit

from hub_magmax.loops import AGREEING, BAND, BLOCK, DROPPED, DROPPED_TIES, LARGEST, TIES

_compiled: Any = njit(nogil=True, error_model="numpy")

_MAGNITUDE = np.uint32(0x7FFFFFFF)
#: For comparisons: vectors of signed integers have them.
_MAGNITUDE_SIGNED = np.int32(0x7FFFFFFF)
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_SECOND = np.uint64(0x94D049BB133111EB)
#: What leaves elements of the task vectors out.
_SPARSE = (TIES, BAND, DROPPED, DROPPED_TIES)
#: Below every float, as `_in_order` has them.
_LEAST = np.int32(-(2**31))
_SPREAD = np.int64(0x9E3779B97F4A7C15 - 2**64)


@_compiled
def _widen(stored, shift, floats):
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
def _copy(values, copied):
    for i in range(copied.shape[0]):
        copied[i] = values[i]


@_compiled
def _count(winners, task):
    count = np.uint32(0)
    for i in range(winners.shape[0]):
        count = np.uint32(count + np.uint32(winners[i] == task))
    return count


@_compiled
def merge_chunk(kind, stored, per_task, given, scaling, out, counts, scratch, whole):
    """Merge one chunk into `out`, add up the elements of each task, and return the largest bits met.

    Args:
        kind: One of the constants above.
        stored: A row of bits per checkpoint, the base model's first: float32 as uint32, bfloat16 as uint16.
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
    num_tasks, num_elements = stored.shape[0] - 1, stored.shape[1]
    shift = np.uint32(32 - 8 * stored.itemsize)
    rows, spare = scratch[:num_tasks], scratch[num_tasks + 2 :]
    bases, merged = scratch[num_tasks], scratch[num_tasks + 1]
    largest = np.uint32(0)
    for start in range(0, num_elements, BLOCK):
        size = min(BLOCK, num_elements - start)
        stop = start + size
        base, found, winners = bases[:size], merged[:size], whole[0, :size]
        _widen(stored[0, start:stop], shift, base)
        for task in range(num_tasks):
            row = rows[task, :size]
            # Not in place: that becomes a masked store.
            vector = spare[3, :size] if kind in _SPARSE else row
            moved = _difference(stored[task + 1, start:stop], shift, base, vector)
            largest = max(largest, moved)
            if kind in _SPARSE:
                _sparsify(kind, task, vector, per_task, given[:, start:stop], row)
        if kind < LARGEST:
            _add_up(kind, rows, per_task, found, spare)
        else:
            if kind == LARGEST:
                _largest(rows, whole[1, :size], winners)
            else:
                _copy(given[0, start:stop], winners)
            for task in range(num_tasks):
                counts[task] += _count(winners, np.int32(task))
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
        _widen(stored[0, start:stop], shift, base)
        for task in range(num_tasks):
            moved = _difference(stored[task + 1, start:stop], shift, base, rows[task, start:stop])
            largest = max(largest, moved)
    return np.int64(largest)


@_compiled
def _magnitudes(row, found):
    for i in range(found.shape[0]):
        found[i] = np.int32(np.float32(row[i]).view(np.int32) & _MAGNITUDE_SIGNED)


@_compiled
def _rank_next(row, task, first, best, best_task, code):
    """Note a task's rise to the largest magnitude so far; `first` are the magnitudes of task 0."""
    bit = np.int32(np.int32(1) << task)
    for i in range(code.shape[0]):
        magnitude = np.int32(np.float32(row[i]).view(np.int32) & _MAGNITUDE_SIGNED)
        so_far = best[i]
        best[i] = max(magnitude, so_far)
        best_task[i] = max(best_task[i], task if magnitude >= so_far else np.int32(0))
        # The larger of both thresholds: reached only where it rises and reaches task 0.
        bound = max(so_far, first[i])
        code[i] = np.int32(code[i] | (bit if magnitude >= bound else np.int32(0)))


@_compiled
def _rank_first(first, best, best_task, code, owner, codes):
    """Where task 0 wins, name it, and in its place the best of the others."""
    for i in range(owner.shape[0]):
        wins = first[i] > best[i]
        alone = np.int32(np.int32(np.int32(1) << best_task[i]) | np.int32(1))
        owner[i] = np.int32(0) if wins else best_task[i]
        codes[i] = alone if wins else code[i]


@_compiled
def rank(run, stride, wanted, owner, codes, scratch, zeros):
    """Write winners and codes of a chunk, as `algorithm_one` describes them; 2 to 32 tasks.

    Args:
        run: float32 memory that holds the task vectors.
        stride: How far apart in it they begin.
        wanted: uint8, whether each task has a quota; the others count as zero.
        owner: uint8 per element.
        codes: Unsigned integers with a bit per task.
        scratch: int32, 4 rows of `BLOCK`.
        zeros: float32, `BLOCK` of them.
    """
    num_tasks, num_elements = wanted.shape[0], owner.shape[0]
    for start in range(0, num_elements, BLOCK):
        stop = min(start + BLOCK, num_elements)
        size = stop - start
        first, best = scratch[0, :size], scratch[1, :size]
        best_task, code = scratch[2, :size], scratch[3, :size]
        _magnitudes(run[start:stop] if wanted[0] else zeros[:size], first)
        best[:] = 0
        best_task[:] = 1
        code[:] = 0
        for task in range(1, num_tasks):
            row = run[task * stride + start : task * stride + stop] if wanted[task] else zeros[:size]
            _rank_next(row, np.int32(task), first, best, best_task, code)
        _rank_first(first, best, best_task, code, owner[start:stop], codes[start:stop])
    return np.int64(0)


@_compiled
def _key(index, before, middle):
    """Return the key of an element, which `randomness.CounterGenerator.keys` gives as signed."""
    mixed = np.uint64(index) * _INCREMENT + before
    mixed ^= mixed >> np.uint64(30)
    mixed *= _MULTIPLY_FIRST
    mixed ^= middle
    mixed ^= mixed >> np.uint64(27)
    mixed *= _MULTIPLY_SECOND
    mixed ^= mixed >> np.uint64(31)
    return np.int64(mixed)


@_compiled
def _find(owner, value, found):
    """Write the places at which `owner` is `value`, and return how many there are."""
    count = 0
    for i in range(owner.shape[0]):
        found[count] = i
        count += owner[i] == value
    return count


@_compiled
def _heir(code, mask):
    """Return the highest bit of a code below a mask, 0 where there is none."""
    rest = code & mask
    bit = 0
    for step in (16, 8, 4, 2, 1):
        higher = rest >> np.uint32(step)
        bit += step if higher else 0
        rest = higher if higher else rest
    return bit


@_compiled
def draw(owner, codes, value, mask, mark, before, middle, low, high, received, places, keys, scratch):
    """Give the elements of `value` whose keys lie below `low` to their heirs; collect those up to `high`.

    An heir is the highest task in an element's code among those in `mask`, plus `mark`.

    Args:
        owner: uint8 per element, changed.
        codes: As `rank` writes them.
        received: int64 per task, added to: how many were given away.
        places, keys: Take the elements between `low` and `high`.
        scratch: int64, 2 rows of `BLOCK` + 1.

    Returns:
        How many lie between, which may be more than there is place for.
    """
    found, drawn = scratch[0], scratch[1]
    between = np.int64(0)
    for start in range(0, owner.shape[0], BLOCK):
        part = owner[start : start + BLOCK]
        count = _find(part, value, found)
        for n in range(count):
            drawn[n] = _key(start + found[n], before, middle)
        for n in range(count):
            place = start + found[n]
            if drawn[n] < low:
                heir = _heir(codes[place], mask)
                owner[place] = heir + mark
                received[heir] += 1
            elif drawn[n] <= high:
                if between < places.shape[0]:
                    places[between] = place
                    keys[between] = drawn[n]
                between += 1
    return between


@_compiled
def _place(drawn, edges, names, owner):
    """Name the part between two edges in which each key lies."""
    for i in range(owner.shape[0]):
        place = 0
        for edge in edges:
            place += np.uint64(drawn[i]) >= edge
        owner[i] = names[place]


@_compiled
def mix(start, before, middle, edges, names, owner, scratch):
    """Write a task for each element, drawn by its key.

    Args:
        start: Index of the first element.
        before, middle: Constants of the stream.
        edges: The least key, as uint64, of every part but the first, ascending.
        names: uint8, the task of each part.
        owner: uint8 per element.
        scratch: int64, `BLOCK`.
    """
    for first in range(0, owner.shape[0], BLOCK):
        part = owner[first : first + BLOCK]
        for n in range(part.shape[0]):
            scratch[n] = _key(start + first + n, before, middle)
        _place(scratch, edges, names, part)
    return np.int64(0)


@_compiled
def _draw_pair(start, before, middle, first, second):
    """Write the lower and the upper half of each key."""
    for i in range(first.shape[0]):
        key = np.uint64(_key(start + i, before, middle))
        first[i] = np.uint32(key)
        second[i] = np.uint32(key >> np.uint64(32))


@_compiled
def _mark(drawn, most, bit, kept):
    for i in range(kept.shape[0]):
        kept[i] = np.uint8(kept[i] | (bit if drawn[i] <= most else np.uint8(0)))


@_compiled
def drop(start, streams, most, kept, scratch):
    """Set a bit for every task and element that is kept: for 8 tasks in each row, the first one's lowest.

    Args:
        start: Index of the first element.
        streams: uint64, a row of two constants per pair of tasks.
        most: uint32; an element is kept for the first task of a pair if the lower half of its key is at most
            this, and for the second one if the upper half is.
        kept: uint8, elements in its columns, zero before.
        scratch: uint32, 2 rows of `BLOCK`.
    """
    for begin in range(0, kept.shape[1], BLOCK):
        end = min(begin + BLOCK, kept.shape[1])
        first, second = scratch[0, : end - begin], scratch[1, : end - begin]
        for pair in range(streams.shape[0]):
            _draw_pair(start + begin, streams[pair, 0], streams[pair, 1], first, second)
            bit = np.uint8(np.uint8(1) << np.uint8(pair % 4 * 2))
            _mark(first, most, bit, kept[pair // 4, begin:end])
            _mark(second, most, np.uint8(bit << np.uint8(1)), kept[pair // 4, begin:end])
    return np.int64(0)


@_compiled
def _count_above(row, bound):
    count = np.int32(0)
    for i in range(row.shape[0]):
        magnitude = np.int32(np.float32(row[i]).view(np.int32) & _MAGNITUDE_SIGNED)
        count = np.int32(count + np.int32(magnitude > bound))
    return count


@_compiled
def _find_between(row, low, high, found):
    """Write the magnitudes between two bounds, as bits, and return how many there are."""
    count = 0
    for i in range(row.shape[0]):
        magnitude = np.int32(np.float32(row[i]).view(np.int32) & _MAGNITUDE_SIGNED)
        found[count] = magnitude
        count += (magnitude >= low) & (magnitude <= high)
    return count


@_compiled
def count_magnitudes(row, low, high, shift, bins, most, least, scratch):
    """Add magnitudes from `low` to `high` (bits) to the bins of a histogram; return how many lie above.

    Args:
        row: float32.
        low, high: int32.
        shift: A bin holds 2**shift neighbouring magnitudes, the first one beginning at `low`.
        bins: int64, changed.
        most, least: int32 per bin, changed: its largest less `low`, `high` less its smallest, plus 1 each.
        scratch: int32, `BLOCK` + 1.
    """
    above = np.int64(0)
    for start in range(0, row.shape[0], BLOCK):
        part = row[start : start + BLOCK]
        above += _count_above(part, high)
        for n in range(_find_between(part, low, high, scratch)):
            magnitude = scratch[n]
            place = (magnitude - low) >> shift
            bins[place] += 1
            most[place] = max(most[place], magnitude - low + 1)
            least[place] = max(least[place], high - magnitude + 1)
    return above


@_compiled
def largest(run, stride, rows, size):
    """Return the largest magnitude, as bits, among the first `size` elements of some rows.

    Args:
        run: float32 memory that holds the task vectors.
        stride: How far apart in it they begin.
        rows: int64, which of them count.
    """
    found = np.int32(0)
    for row in rows:
        for i in range(row * stride, row * stride + size):
            found = max(found, np.int32(np.float32(run[i]).view(np.int32) & _MAGNITUDE_SIGNED))
    return np.int64(found)


@_compiled
def _in_order(number):
    """Return an integer for each float32, in the same order: vectors of integers have a maximum."""
    bits = np.float32(number).view(np.int32)
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & _MAGNITUDE_SIGNED))


@_compiled
def _follow(row, lowest, best, second):
    """Let a task be second where it is neither best so far nor below the second so far."""
    for i in range(second.shape[0]):
        high = _in_order(np.float32(abs(row[i]) - lowest))
        second[i] = max(second[i], min(best[i], high))


@_compiled
def _lead(row, lowest, task, best, winners):
    """Let a task win where it reaches the best so far. Tasks come in order."""
    for i in range(winners.shape[0]):
        high = _in_order(np.float32(abs(row[i]) - lowest))
        so_far = best[i]
        best[i] = max(high, so_far)
        winners[i] = max(winners[i], task if high >= so_far else np.int32(0))


@_compiled
def _assure(row, highest, surest):
    for i in range(surest.shape[0]):
        surest[i] = max(surest[i], _in_order(np.float32(abs(row[i]) - highest)))


@_compiled
def _find_open(surest, second, found):
    """Write the places where nobody is sure to win, and return how many there are."""
    count = 0
    for i in range(surest.shape[0]):
        found[count] = i
        count += surest[i] <= second[i]
    return count


@_compiled
def settle(run, stride, rows, bottoms, tops, owner, counts, open_, scratch, places):
    """Write winners, and collect the elements of which the winner depends on where in a box prices are.

    Args:
        run, stride, rows: As for `largest`.
        bottoms, tops: float32 per row, the box.
        owner: uint8 per element, numbers of rows in the order of `rows`.
        counts: int64 per row, added to: how many each is sure of.
        open_: int64 per element, takes the places of the others.
        scratch: int32, 4 rows of `BLOCK`.
        places: int64, `BLOCK` + 1.

    Returns:
        How many are open.
    """
    num_open = np.int64(0)
    for start in range(0, owner.shape[0], BLOCK):
        stop = min(start + BLOCK, owner.shape[0])
        size = stop - start
        best, second, surest = scratch[0, :size], scratch[1, :size], scratch[2, :size]
        winners = scratch[3, :size]
        best[:] = _LEAST
        second[:] = _LEAST
        surest[:] = _LEAST
        winners[:] = 0
        for task in range(rows.shape[0]):
            begin = rows[task] * stride + start
            row = run[begin : begin + size]
            _follow(row, bottoms[task], best, second)
            _lead(row, bottoms[task], np.int32(task), best, winners)
            _assure(row, tops[task], surest)
        for task in range(rows.shape[0]):
            counts[task] += _count(winners, np.int32(task))
        _copy(winners, owner[start:stop])
        for n in range(_find_open(surest, second, places)):
            place = start + places[n]
            counts[owner[place]] -= 1
            open_[num_open] = place
            num_open += 1
    return num_open


@_compiled
def _describe(run, stride, rows, place, scale, prices, bottoms, tops, distances):
    """Write each task's distance below the best, -1 if out of reach, and return a code of them."""
    highest, leader = -np.inf, -np.inf
    for task in range(rows.shape[0]):
        value = np.rint(np.float64(abs(run[rows[task] * stride + place])) * scale)
        distances[task] = value
        highest = max(highest, value - tops[task])
        leader = max(leader, value - prices[task])
    code = np.int64(0)
    for task in range(rows.shape[0]):
        value = distances[task]
        distance = leader + 1 - (value - prices[task]) if value - bottoms[task] >= highest else 0.0
        distances[task] = distance - 1
        code ^= np.int64(distances[task])
        code *= _SPREAD
        code ^= code >> 29
    return code


@_compiled
def _search(codes, code):
    """Return the place of the first code that is not below another one, at most the last place."""
    low, high = 0, codes.shape[0] - 1
    while low < high:
        middle = (low + high) // 2
        if codes[middle] < code:
            low = middle + 1
        else:
            high = middle
    return low


@_compiled
def group(run, stride, rows, open_, scale, prices, bottoms, tops, codes, examples, first, marks, scratch):
    """Write for each open element the mark of the group that it belongs to, or leave what is there.

    Args:
        run, stride, rows: As for `largest`.
        open_: int64, places of elements.
        scale: float64, turns magnitudes into whole numbers.
        prices, bottoms, tops: float64 per row.
        codes: int64 per group, sorted.
        examples: float64, rows by groups, the distances of each group.
        first: The mark of the first group.
        marks: uint8 per open element.
        scratch: float64 per row.
    """
    for n in range(open_.shape[0]):
        code = _describe(run, stride, rows, open_[n], scale, prices, bottoms, tops, scratch)
        place = _search(codes, code)
        alike = codes[place] == code
        for task in range(rows.shape[0]):
            alike &= examples[task, place] == scratch[task]
        if alike:
            marks[n] = first + place
    return np.int64(0)


@_compiled
def _net(row, price, best):
    """Let a task's magnitudes less its price be the best so far, where they are."""
    for i in range(best.shape[0]):
        best[i] = np.maximum(best[i], np.float64(abs(row[i])) - price)


@_compiled
def _add_lanes(values, lanes):
    """Add each eighth element to one of eight sums, in order."""
    whole = values.shape[0] // 8 * 8
    for i in range(0, whole, 8):
        for lane in range(8):
            lanes[lane] += values[i + lane]
    for i in range(whole, values.shape[0]):
        lanes[i - whole] += values[i]


@_compiled
def weigh(run, stride, rows, prices, owner, regrets, kept, scratch):
    """Add up what winners fall short of the best task, net of prices, and their magnitudes.

    Args:
        run, stride, rows: As for `largest`.
        prices: float64 per row.
        owner: uint8 per element.
        regrets, kept: float64, 8 sums each, added to.
        scratch: float64, 2 rows of `BLOCK`.
    """
    for start in range(0, owner.shape[0], BLOCK):
        stop = min(start + BLOCK, owner.shape[0])
        best, chosen = scratch[0, : stop - start], scratch[1, : stop - start]
        best[:] = -np.inf
        for task in range(rows.shape[0]):
            begin = rows[task] * stride + start
            _net(run[begin : begin + stop - start], prices[task], best)
        for i in range(stop - start):
            winner = owner[start + i]
            value = np.float64(abs(run[rows[winner] * stride + start + i]))
            chosen[i] = value
            best[i] -= value - prices[winner]
        _add_lanes(best, regrets)
        _add_lanes(chosen, kept)
    return np.int64(0)
