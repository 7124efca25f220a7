"""Inner products of the base model's values and the task vectors by a compiled loop.

The order of sums is that of `kernels.products`. A product of two float32 numbers is exact in float64, so that
multiplying and adding in one instruction, where a processor has it, gives the same bits.
"""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hub_magmax.kernels.compiled.cache import LANES
from hub_magmax.kernels.compiled.merge import read_all
from hub_magmax.kernels.compiled.simd import as_floats, compiled, doubles, inlined, load, load_doubles, store
from hub_magmax.kernels.compiled.values import widened
from hub_magmax.kernels.products import BLOCK, GROUPS, ROWS

_intrinsic: Any = intrinsic

_GROUP = ROWS * LANES

#: Vectors whose pairs are all added up at once; of more, `_AT_ONCE` with as many others at a time. The sums
#: of these pairs stay in registers.
_MOST, _AT_ONCE = 6, 4

#: Lanes that are added up at once: as many float64 numbers as the widest registers hold.
_HALF = LANES // 2
_FLOATS, _DOUBLES = ir.VectorType(ir.FloatType(), _HALF), ir.VectorType(ir.DoubleType(), _HALF)


def _add_rows(builder, places, load, pairs, size):
    """Emit a loop over rows that adds products of pairs of vectors to the sums at some places."""
    sums = [builder.load(place, align=8) for place in places]
    before, rows = builder.block, builder.append_basic_block("rows")
    builder.branch(rows)
    builder.position_at_end(rows)
    row, *found = (builder.phi(kind) for kind in (size.type, *[_DOUBLES] * len(pairs)))
    held = {vector: load(vector, row) for vector in sorted({vector for pair in pairs for vector in pair})}
    fused = ("contract",)
    added = [
        builder.fadd(total, builder.fmul(held[one], held[other], flags=fused), flags=fused)
        for total, (one, other) in zip(found, pairs, strict=True)
    ]
    row_after = builder.add(row, size.type(LANES))
    for phi, first, later in zip((row, *found), (size.type(0), *sums), (row_after, *added), strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, rows)
    after = builder.append_basic_block("rows.after")
    builder.cbranch(builder.icmp_signed("<", row_after, size), rows, after)
    builder.position_at_end(after)
    for place, total in zip(places, added, strict=True):
        builder.store(total, place, align=8)


def _adding(cases):
    """Return what adds products of vectors, row by row, to the sums of some pairs of them.

    Args:
        cases: Lists of pairs, of which one is chosen by its number. Vectors count from `first` on; those
            that are not below `_AT_ONCE`, from `second` on. `at` is where a group's sums of a lane begin.
    """

    @_intrinsic
    def add(context, moved, sums, case, first, second, size, at):
        def emit(context, builder, signature, values):
            vectors, totals = (
                context.make_array(kind)(context, builder, value)
                for kind, value in zip((moved, sums), values, strict=False)
            )
            case, first, second, size, at = values[2:]
            lane = builder.and_(at, size.type(LANES - 1))
            num_vectors, step = (builder.extract_value(vectors.shape, axis) for axis in (0, 1))

            def number(vector):
                far = vector >= _AT_ONCE
                return builder.add(second if far else first, size.type(vector - _AT_ONCE * far))

            def load(vector, row):
                place = builder.add(builder.add(builder.mul(number(vector), step), lane), row)
                memory = builder.gep(vectors.data, [place])
                found = builder.load(builder.bitcast(memory, _FLOATS.as_pointer()), align=4)
                return builder.fpext(found, _DOUBLES)

            def sum_of(one, other):
                pair = builder.add(builder.mul(number(one), num_vectors), number(other))
                place = builder.add(builder.mul(pair, size.type(LANES)), at)
                return builder.bitcast(builder.gep(totals.data, [place]), _DOUBLES.as_pointer())

            after = builder.append_basic_block("added")
            switch = builder.switch(case, after)
            for place, pairs in enumerate(cases):
                switch.add_case(place, builder.append_basic_block(f"case.{place}"))
                builder.position_at_end(builder.function.basic_blocks[-1])
                _add_rows(builder, [sum_of(*pair) for pair in pairs], load, pairs, size)
                builder.branch(after)
            builder.position_at_end(after)
            return context.get_dummy_value()

        return types.void(moved, sums, *[types.intp] * 5), emit

    return add


#: Add products of all pairs of as many vectors as the number says, and one; of four with that many others.
_add_all = _adding([[*combinations_with_replacement(range(1 + n), 2)] for n in range(_MOST)])
_add_others = _adding(
    [[*product(range(_AT_ONCE), range(_AT_ONCE, _AT_ONCE + 1 + n))] for n in range(_AT_ONCE)]
)


@inlined
def _move(stored, start, number, moved, row, place):
    """Write sixteen elements of a vector as float32: of the base model's, or what a task adds to it."""
    found = widened(stored, row * stored.shape[1] + start, number)
    if row:
        found = found - as_floats(load(moved, place, None))
    store(moved, row * moved.shape[1] + place, None, found)


@compiled
def _move_tile(stored, first, size, moved):
    """Write all vectors of a tile as float32, and zeros after its last element up to a whole row."""
    whole = size // LANES * LANES
    for row in range(stored.shape[0]):
        for place in range(0, whole, LANES):
            _move(stored, first + place, None, moved, row, place)
        if whole < size:
            _move(stored, first + whole, size - whole, moved, row, whole)


@compiled
def _add_tile(moved, size, sums, at):
    """Add products of all pairs of vectors, of `size` elements in rows of sixteen."""
    count = moved.shape[0]
    for lane in range(0, LANES, _HALF):
        first = 0
        while first < count:
            own = count - first if count <= _MOST else min(count - first, _AT_ONCE)
            _add_all(moved, sums, own - 1, first, first + _AT_ONCE, size, at + lane)
            for second in range(first + own, count, _AT_ONCE):
                others = min(count - second, _AT_ONCE)
                _add_others(moved, sums, others - 1, first, second, size, at + lane)
            first += own


@compiled
def _add_block(stored, first, size, moved, skipped, sums):
    """Add products of a block, group by group."""
    for begin in range(0, size, _GROUP):
        part = min(size - begin, _GROUP)
        _move_tile(stored, first + begin, part, moved)
        _add_tile(moved[skipped:], part, sums, begin // _GROUP * sums.shape[1])


@compiled
def _fold(sums, count, found, column):
    """Add up the groups and the lanes of each pair, and clear them."""
    size = sums.shape[1]
    half = GROUPS // 2 * size
    while half >= size:
        for place in range(0, half, LANES):
            store(sums, place, None, load_doubles(sums, place) + load_doubles(sums, half + place))
        half //= 2
    pair = 0
    for one in range(count):
        for other in range(one, count):
            first, half = (one * count + other) * LANES, LANES // 2
            while half:
                for lane in range(first, first + half):
                    sums[0, lane] += sums[0, lane + half]
                half //= 2
            found[pair, column] = sums[0, first]
            pair += 1
    for place in range(0, sums.size, LANES):
        store(sums, place, None, doubles(0.0))


@compiled
def add_products(files, num_elements, skipped, moved, sums, found):
    """Write the inner products of a chunk, block by block; return 0, or -1 where not all could be read.

    Args:
        files: `Reading`.
        num_elements: Of the chunk.
        skipped: 1 for the task vectors alone, 0 with the base model's values.
        moved: float32, base model and tasks by `ROWS` · 16, scratch.
        sums: float64, `GROUPS` by vectors · vectors · 16, zeros.
        found: float64, pairs by blocks.
    """
    stored = files.memory
    held = stored.shape[1]
    for start in range(0, num_elements, BLOCK):
        size, first = min(BLOCK, num_elements - start), start % held
        is_due = files.descriptors.shape[0] > 0 and first == 0
        if is_due and not read_all(files, start, min(held, num_elements - start)):
            return np.int64(-1)
        _add_block(stored, first, size, moved, skipped, sums)
        _fold(sums, moved.shape[0] - skipped, found, start // BLOCK)
    return np.int64(0)
