"""Loops over a whole tensor before it is merged: what `selection` and `kernels` ask of it, as machine code.

Written like those of `compiled`, for the same reasons.
"""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# ruff: noqa: PLR0913, PLR0917

from __future__ import annotations

import numpy as np

from hub_magmax.kernels.compiled.bits import count, find
from hub_magmax.kernels.compiled.cache import BLOCK, FIRST_MARK, LANES, MIX_BITS, NOBODY
from hub_magmax.kernels.compiled.jit import compiled, inlined
from hub_magmax.kernels.compiled.merge import finish, magnitude, widened
from hub_magmax.kernels.compiled.simd import (
    as_doubles,
    as_floats,
    as_ints,
    as_longs,
    as_numbers,
    choose,
    doubles,
    floats,
    highest_bits,
    ints,
    larger,
    largest,
    load,
    longs,
    lower,
    nearest,
    smaller,
    steps,
    store,
    total,
)

_INCREMENT = np.int64(0x9E3779B97F4A7C15 - 2**64)
_MULTIPLY_FIRST = np.int64(0xBF58476D1CE4E5B9 - 2**64)
_MULTIPLY_SECOND = np.int64(0x94D049BB133111EB - 2**64)


@inlined
def _base_at(base, start, number):
    """Return the base model's elements, zeros where it is subtracted already."""
    return widened(base, start, number) if base.shape[0] else floats(0.0)


@inlined
def _rank(rows, stride, base, start, number, wanted, owner, codes):
    """Write winners and codes of sixteen elements, and return the largest magnitudes."""
    below = _base_at(base, start, number)
    first, best, best_task, code, top = ints(0), ints(0), ints(1), ints(0), ints(0)
    for task in range(wanted.shape[0]):
        found = ints(0)
        if wanted[task]:
            found = magnitude(widened(rows, task * stride + start, number) - below)
            top = larger(top, found)
        if task == 0:
            first = found
        else:
            best_task = choose(found >= best, ints(task), best_task)
            # The larger of both thresholds: reached only where it rises and reaches task 0.
            code = code | choose(found >= larger(best, first), ints(1 << task), ints(0))
            best = larger(best, found)
    # Where task 0 wins, name it, and in its place the best of the others.
    wins = first > best
    store(owner, start, number, choose(wins, ints(0), best_task))
    store(codes, start, number, choose(wins, ints(1) << best_task | ints(1), code))
    return top


@compiled
def rank(rows, stride, base, wanted, owner, codes):
    """Write winners and codes of a chunk, as `algorithm_one` describes them; return the largest bits met.

    Args:
        rows, stride, base: As `selection.Bits` has them; 2 to 32 tasks.
        wanted: uint8, whether each task has a quota; the others count as zero.
        owner: uint8 per element.
        codes: Unsigned integers with a bit per task.
    """
    top, size = ints(0), owner.shape[0]
    whole = size // LANES * LANES
    for start in range(0, whole, LANES):
        top = larger(top, _rank(rows, stride, base, start, None, wanted, owner, codes))
    if whole < size:
        top = larger(top, _rank(rows, stride, base, whole, size - whole, wanted, owner, codes))
    return np.int64(largest(top))


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
def _draw(owner, codes, start, number, value, mask, mark, before, middle, low, high, marks, near):
    """Give those of sixteen elements away that `draw` gives, and mark those up to `high`."""
    keys, holder = _keys(start, before, middle), load(owner, start, number)
    is_held, is_given = holder == ints(value), keys < longs(low)
    heir = highest_bits(load(codes, start, number) & ints(mask)) + ints(mark)
    store(owner, start, number, choose(is_held & is_given, heir, holder))
    between = choose(is_given, ints(0), as_numbers(keys <= longs(high)))
    store(marks, near, number, choose(is_held, between, ints(0)))


@compiled
def draw(owner, codes, value, mask, mark, before, middle, low, high, places, found, marks):
    """Give the elements of `value` whose keys lie below `low` to their heirs; collect those up to `high`.

    An heir is the highest task in an element's code among those in `mask`, plus `mark`. Keys are drawn for
    all elements: .3 ns for each, where finding those of `value` first takes 2 to 5 for each that is found.

    Args:
        owner: uint8 per element, changed.
        codes: As `rank` writes them.
        places: int64, takes the elements between `low` and `high`.
        found, marks: int64, `BLOCK` + `SPARE`, and uint8, `BLOCK`.

    Returns:
        How many lie between, which may be more than there is place for.
    """
    between = np.int64(0)
    what = value, mask, mark, before, middle, low, high, marks
    for first in range(0, owner.shape[0], BLOCK):
        size = min(BLOCK, owner.shape[0] - first)
        whole = size // LANES * LANES
        for near in range(0, whole, LANES):
            _draw(owner, codes, first + near, None, *what, near)
        if whole < size:
            _draw(owner, codes, first + whole, size - whole, *what, whole)
        number = find(marks[:size], np.uint8(1), found)
        for k in range(min(number, places.shape[0] - between)):
            places[between + k] = first + found[k]
        between += number
    return between


@compiled
def rename(owner, names):
    """Turn every byte into its entry of `names` (uint8, 256)."""
    for i in range(owner.shape[0]):
        owner[i] = names[owner[i]]
    return np.int64(0)


@compiled
def _write_keys(start, before, middle, keys):
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
        _write_keys(start + first, before, middle, keys)
        _look_up(keys, shift, table, part)
        for n in range(find(part, np.uint8(255), found)):
            part[found[n]] = _name(keys[found[n]], edges, names)
    return np.int64(0)


@inlined
def _drop(start, begin, number, streams, most, kept):
    """Write the bits of sixteen elements, row after row; `most` as a signed number less than any by 2**31."""
    for row in range(kept.shape[0]):
        found = ints(0)
        for pair in range(4 * row, min(4 * row + 4, streams.shape[0])):
            keys = _keys(start + begin, streams[pair, 0], streams[pair, 1])
            bit = 1 << pair % 4 * 2
            found = found | choose(_unsigned(lower(keys)) <= most, ints(bit), ints(0))
            found = found | choose(_unsigned(lower(keys >> longs(32))) <= most, ints(2 * bit), ints(0))
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
        most: uint32; an element is kept for the first task of a pair if the lower half of its key is at most
            this, and for the second one if the upper half is.
        kept: uint8, elements in its columns.
    """
    size, bound = kept.shape[1], _unsigned(ints(most))
    whole = size // LANES * LANES
    for begin in range(0, whole, LANES):
        _drop(start, begin, None, streams, bound, kept)
    if whole < size:
        _drop(start, whole, size - whole, streams, bound, kept)
    return np.int64(0)


@compiled
def _magnitude_at(stored, place, base, start):
    """Return the magnitude of one element, which is at one place in `stored` and at another in `base`."""
    shift = np.uint32(32 - 8 * stored.itemsize)
    value = np.uint32(np.uint32(stored[place]) << shift).view(np.float32)
    below = np.float32(0.0)
    if base.shape[0]:
        below = np.uint32(np.uint32(base[start]) << shift).view(np.float32)
    return np.float32(abs(np.float32(value - below)))


@inlined
def _mark(stored, first, base, start, number, bound, marks, near, opened, tally):
    """Mark magnitudes between two bounds, and return what `tally` is with them.

    Args:
        tally: The largest magnitudes, and how many lie above the bounds, at the upper and at the lower one.
            Elements after the first `number` count as zeros.
    """
    found = magnitude(widened(stored, first + start, number) - _base_at(base, start, number))
    low, high = ints(bound[0]), ints(bound[1])
    store(marks, near, number, as_numbers((found > low) & (found < high)))
    if opened.shape[0] and bound[3] <= bound[4]:
        is_open = as_numbers((found >= ints(bound[3])) & (found <= ints(bound[4])))
        store(opened, start, number, load(opened, start, number) | is_open)
    top, above, at_high, at_low = tally
    return (
        larger(top, found),
        above + as_numbers(found > high),
        at_high + as_numbers(found == high),
        at_low + as_numbers(found == low),
    )


@compiled
def _mark_block(stored, first, base, start, stop, bound, marks, opened, outside):
    """Mark a block, count what lies outside, and return the largest bits met."""
    tally, size = (ints(0), ints(0), ints(0), ints(0)), stop - start
    whole = size // LANES * LANES
    for near in range(0, whole, LANES):
        tally = _mark(stored, first, base, start + near, None, bound, marks, near, opened, tally)
    if whole < size:
        rest = size - whole
        tally = _mark(stored, first, base, start + whole, rest, bound, marks, whole, opened, tally)
        outside[1] -= (LANES - rest) * (bound[1] == 0)
        outside[2] -= (LANES - rest) * (bound[0] == 0)
    for number in range(3):
        outside[number] += total(tally[number + 1])
    return np.int64(largest(tally[0]))


@compiled
def count_magnitudes(
    rows, stride, base, num_elements, num_ranks, bounds, edges, bins, most, least, outside, opened,
    places, marks,
):  # fmt: skip
    """Add each task's magnitudes between bounds to the bins of histograms; return the largest bits met.

    What equals a bound is only counted: often it is one value of very many elements.

    Args:
        rows, stride, base, num_elements: As `selection.Bits` has them.
        num_ranks: Histograms per task.
        bounds: int32, five numbers per histogram, the first task's first: `low` and `high`, as bits, and
            `shift`: a bin holds 2**shift neighbouring magnitudes, the first one beginning at `low`; and the
            least and the largest magnitude that leaves an element open.
        edges: int64 per histogram and one more, where its bins begin, and where they end.
        bins: int64, changed.
        most, least: int32 per bin, changed: its largest less `low`, `high` less its smallest, plus 1 each.
        outside: int64, three numbers per histogram, added to: how many lie above `high`, at it, and at `low`.
        opened: uint8 per element, or none: set to 1 where a magnitude leaves it open.
        places: int64, `BLOCK` + `SPARE`.
        marks: uint8, `BLOCK`.
    """
    met = np.int64(0)
    for start in range(0, num_elements, BLOCK):
        stop = min(start + BLOCK, num_elements)
        marked = marks[: stop - start]
        for number in range(bounds.shape[0]):
            bound, first, begin = bounds[number], number // num_ranks * stride, edges[number]
            low, high, shift = bound[0], bound[1], bound[2]
            met = max(
                met,
                _mark_block(rows, first, base, start, stop, bound, marked, opened, outside[number]),
            )
            for k in range(find(marked, np.uint8(1), places)):
                place = start + places[k]
                found = np.float32(_magnitude_at(rows, first + place, base, place)).view(np.int32)
                bin_ = begin + ((found - low) >> shift)
                bins[bin_] += 1
                most[bin_] = max(most[bin_], found - low + 1)
                least[bin_] = max(least[bin_], high - found + 1)
    return met


@inlined
def _lead(rows, stride, base, start, number, active, bonuses, owner, marks, near, scaling, out, tasks):
    """Name who reaches furthest with the most, mark the elements that nobody is sure to win, and merge.

    Returns the largest magnitudes of task vectors and of what was merged.
    """
    below, top, met = _base_at(base, start, number), ints(0), ints(0)
    best, second, surest = ints(-1), ints(-1), ints(-1)
    winner, winning_task, update = ints(0), ints(0), floats(0.0)
    for task in range(active.shape[0]):
        moved = widened(rows, active[task] * stride + start, number) - below
        found = abs(moved)
        top = larger(top, as_ints(found))
        high = as_ints(found + floats(bonuses[0, task]))
        leads = high >= best
        winner = choose(leads, ints(task), winner)
        winning_task = choose(leads, ints(active[task]), winning_task)
        update = choose(leads, moved, update)
        second = larger(second, smaller(best, high))
        best = larger(best, high)
        surest = larger(surest, as_ints(found + floats(bonuses[1, task])))
    is_open = surest <= second
    store(owner, start, number, winner)
    store(marks, near, number, as_numbers(is_open))
    if out.shape[0]:
        store(tasks, start, number, choose(is_open, ints(0), winning_task))
        met = finish(update, below, scaling, out, start, number)
    return top, met


@compiled
def _lead_block(rows, stride, base, start, stop, active, bonuses, owner, marks, facts, scaling, out, tasks):
    top, met, size = ints(0), ints(0), stop - start
    whole = size // LANES * LANES
    who, merging = (active, bonuses, owner, marks), (scaling, out, tasks)
    for near in range(0, whole, LANES):
        found, merged = _lead(rows, stride, base, start + near, None, *who, near, *merging)
        top, met = larger(top, found), larger(met, merged)
    if whole < size:
        found, merged = _lead(rows, stride, base, start + whole, size - whole, *who, whole, *merging)
        top, met = larger(top, found), larger(met, merged)
    facts[1] = max(facts[1], np.int64(largest(top)))
    facts[3] = max(facts[3], np.int64(largest(met)))


@inlined
def _describe(values, stride, start, number, scale, box, distances):
    """Write how far each task of sixteen elements is below the best, -1 if out of reach.

    Returns codes of that, and how many tasks are in reach.

    Args:
        values: float32, magnitudes: of each task from `start` on, `stride` after the one before.
        scale, box: As for `settle`.
        distances: float64, as values.
    """
    highest, leader, zero = doubles(-np.inf), doubles(-np.inf), doubles(0.0)
    for task in range(box.shape[1]):
        value = _on_grid(values, task * stride + start, number, scale)
        high, net = value - doubles(box[2, task]), value - doubles(box[0, task])
        highest = choose(high > highest, high, highest)
        leader = choose(net > leader, net, leader)
    code, reached = longs(0), ints(0)
    for task in range(box.shape[1]):
        value = _on_grid(values, task * stride + start, number, scale)
        is_reached = value - doubles(box[1, task]) >= highest
        distance = choose(is_reached, leader - (value - doubles(box[0, task])), doubles(-1.0))
        store(distances, task * stride + start, number, distance)
        reached = reached + as_numbers(distance >= zero)
        code = (code ^ as_longs(distance)) * longs(_INCREMENT)
        code = code ^ code >> longs(29)
    return code, reached


@inlined
def _on_grid(values, start, number, scale):
    return nearest(as_doubles(as_floats(load(values, start, number))) * doubles(scale))


@compiled
def describe(values, scale, box, distances, codes, in_reach):
    """Write the distances and the code of each element, and how many tasks have it in reach.

    Args:
        values: float32, tasks by elements, magnitudes.
        scale, box: As for `settle`.
        distances: float64, as values.
        codes: int64 per element.
        in_reach: uint8 per element.
    """
    size = codes.shape[0]
    whole = size // LANES * LANES
    for start in range(0, whole, LANES):
        code, reached = _describe(values, size, start, None, scale, box, distances)
        store(codes, start, None, code)
        store(in_reach, start, None, reached)
    if whole < size:
        code, reached = _describe(values, size, whole, size - whole, scale, box, distances)
        store(codes, whole, size - whole, code)
        store(in_reach, whole, size - whole, reached)
    return np.int64(0)


@compiled
def _is_off_grid(near, place, scale):
    """Return 1 if a magnitude in a column is not a whole number by this scale."""
    off = np.int64(0)
    for task in range(near.shape[0]):
        value = np.float64(near[task, place]) * scale
        off |= np.int64(value != np.rint(value))
    return off


@compiled
def _group(slots, codes, examples, code, distances, place):
    """Return the group of the distances in a column, or -1."""
    slot = np.uint64(code) & np.uint64(slots.shape[0] - 1)
    while slots[slot] >= 0:
        group = slots[slot]
        if codes[group] == code:
            for task in range(distances.shape[0]):
                if examples[group, task] != distances[task, place]:
                    return np.int64(-1)
            return np.int64(group)
        slot = (slot + np.uint64(1)) & np.uint64(slots.shape[0] - 1)
    return np.int64(-1)


@inlined
def _gather(rows, stride, base, active, places, near):
    """Write the magnitudes of up to sixteen elements, each into a column."""
    for column in range(places.shape[0]):
        for task in range(active.shape[0]):
            at = active[task] * stride + places[column]
            near[task, column] = _magnitude_at(rows, at, base, places[column])


@compiled
def settle(
    rows, stride, base, active, bonuses, scale, box, slots, codes, examples,
    owner, counts, facts, single, kept, marks, opened, near, distances, found, scaling, out, tasks,
):  # fmt: skip
    """Write winners; where the winner depends on where in a box prices are, the mark of a group or `NOBODY`.

    Args:
        rows, stride, base: As `selection.Bits` has them.
        active: int64, the tasks that take part; below, they are numbered as they are here.
        bonuses: float32, 2 rows of a non-negative number per task, the most and the least in the box of what
            is added to its magnitudes, in the unit of the rows.
        scale: float64, turns magnitudes into whole numbers.
        box: float64, 3 rows of a number per task, prices and the bottom and the top of the box.
        slots: int64, as many as a power of two: at a code's low bits or after them, the number of its group,
            -1 where there is none.
        codes: int64 per group.
        examples: float64, groups by tasks, the distances of each group.
        owner: uint8 per element.
        counts: int64 for each byte, added to.
        facts: int64, four numbers: how many with the mark of a group have magnitudes that were rounded to
            whole numbers, added to; the largest bits of a magnitude, raised; how many nobody is sure to win;
            and the largest bits of what was merged, raised.
        single: int64 per element, takes the places of those that belong to nobody.
        kept: float32, elements by tasks, takes their magnitudes.
        marks: uint8, `BLOCK`.
        opened: int64 per element, and `SPARE`, takes the places of those that nobody is sure to win.
        near, distances, found: float32 and float64, tasks by `LANES`, and int64, `LANES`; zero at first.
        scaling, out, tasks: As `merge_chunk` has the first two; and uint8, takes the row that an element was
            merged from. Of those that nobody is sure to win it is 0, and what is merged is anything. Nothing
            is merged if there are no elements in `out`.

    Returns:
        How many belong to nobody.
    """
    num_tasks, num_single = active.shape[0], np.int64(0)
    facts[2] = 0
    for start in range(0, owner.shape[0], BLOCK):
        stop = min(start + BLOCK, owner.shape[0])
        part, marked = owner[start:stop], marks[: stop - start]
        who = active, bonuses, owner, marked
        _lead_block(rows, stride, base, start, stop, *who, facts, scaling, out, tasks)
        for task in range(num_tasks):
            counts[task] += count(part, np.uint8(task))
        places = opened[facts[2] :]
        number = find(marked, np.uint8(1), places)
        facts[2] += number
        for first in range(0, number, LANES):
            some = places[first : min(first + LANES, number)]
            some += start
            _gather(rows, stride, base, active, some, near)
            code, _ = _describe(near, LANES, 0, None, scale, box, distances)
            store(found, 0, None, code)
            for column in range(some.shape[0]):
                place = some[column]
                mark = FIRST_MARK + _group(slots, codes, examples, found[column], distances, column)
                if mark < FIRST_MARK:
                    mark = NOBODY
                    single[num_single] = place
                    for task in range(num_tasks):
                        kept[num_single, task] = near[task, column]
                    num_single += 1
                else:
                    facts[0] += _is_off_grid(near, column, scale)
                counts[owner[place]] -= 1
                counts[mark] += 1
                owner[place] = mark
    return num_single


@compiled
def _net(row, price, best):
    """Let a task's magnitudes less its price be the best so far, where they are."""
    for i in range(best.shape[0]):
        best[i] = np.maximum(best[i], np.float64(abs(row[i])) - price)


@compiled
def _add_lanes(values, lanes):
    """Add each eighth element to one of eight sums, in order."""
    whole = values.shape[0] // 8 * 8
    for i in range(0, whole, 8):
        for lane in range(8):
            lanes[lane] += values[i + lane]
    for i in range(whole, values.shape[0]):
        lanes[i - whole] += values[i]


@compiled
def weigh(run, stride, rows, prices, owner, regrets, kept, scratch):
    """Add up what winners fall short of the best task, net of prices, and their magnitudes.

    Args:
        run, stride: Task vectors as `selection.chunks.run_of` has them, float32.
        rows: int64, which of them count.
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
