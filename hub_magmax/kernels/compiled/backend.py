"""The compiled backend: loops of machine code for built-in operations and dtypes that float32 holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from hub_magmax.kernels import ops
from hub_magmax.kernels.backend import Merged
from hub_magmax.kernels.chunk import INFINITY_BITS, LOOP_DTYPES, NARROW_DTYPES, RawChunk
from hub_magmax.kernels.compiled import cache
from hub_magmax.kernels.dtypes import torch_dtype
from hub_magmax.kernels.ops import Inputs, Op
from hub_magmax.kernels.products import BLOCK, GROUPS, ROWS, num_pairs
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.reference import Reference
from hub_magmax.kernels.row_ranks import RankTable
from hub_magmax.kernels.stored import Stored
from hub_magmax.kernels.structures import (
    Bits,
    BlockSums,
    Codes,
    Contest,
    Draw,
    Edges,
    Found,
    Histograms,
    Merging,
    MostKeys,
    Names,
    Owners,
    PerTask,
    PerTaskRows,
    Places,
    Ranking,
    Reading,
    RowSums,
    Spreads,
    SquareSums,
    Tasks,
    Vectors,
)
from hub_magmax.kernels.winners import Kept, RuleOf, Sight

#: The number of an operation's loop.
KINDS: Mapping[Op, int] = {
    ops.WEIGHTED_SUM: cache.WEIGHTED,
    ops.AFFINE_SUM: cache.AFFINE,
    ops.AGREEING_SUM: cache.AGREEING,
    ops.TIES: cache.TIES,
    ops.TIES_SUM: cache.TIES_SUM,
    ops.BAND: cache.BAND,
    ops.BAND_TIES: cache.BAND_TIES,
    ops.BAND_TIES_SUM: cache.BAND_TIES_SUM,
    ops.DROPPED: cache.DROPPED,
    ops.DROPPED_TIES: cache.DROPPED_TIES,
    ops.DROPPED_TIES_SUM: cache.DROPPED_TIES_SUM,
    ops.SCALED: cache.SCALED,
    ops.SCALED_TIES: cache.SCALED_TIES,
    ops.SCALED_TIES_SUM: cache.SCALED_TIES_SUM,
    ops.SELECTED_TIES: cache.SELECTED_TIES,
    ops.RESCALED_TIES: cache.RESCALED_TIES,
    ops.STITCHED: cache.STITCHED,
    ops.BALANCED: cache.BALANCED,
    ops.CLIPPED: cache.CLIPPED,
    ops.LARGEST: cache.LARGEST,
    ops.CHOSEN: cache.CHOSEN,
}

#: Codes of more bits have no loops.
_CODE_BITS = 32


class Compiled(Reference):
    """Compiled loops where there are any, else the reference."""

    reads_files = True

    @staticmethod
    def is_kept() -> bool:
        """Say whether the loops were compiled earlier, for this processor and by this version."""
        return cache.merge_chunk.is_kept()

    def merge(self, op: Op, chunk: RawChunk, inputs: Inputs, dtype: str, scaling: float) -> Merged:
        """Merge one chunk, as `Backend.merge` says."""
        found = None
        if op in KINDS and dtype in NARROW_DTYPES:
            files = None if chunk.is_read else chunk.files
            if files is not None and files.dtype == dtype and dtype in LOOP_DTYPES:
                found = _merge(op, chunk, inputs, dtype, scaling, from_files=True)
            if found is None and chunk.is_narrow:
                found = _merge(op, chunk, inputs, dtype, scaling, from_files=False)
        return super().merge(op, chunk, inputs, dtype, scaling) if found is None else found

    def task_vectors(self, chunk: RawChunk, room: Callable[[], np.ndarray]) -> Vectors:
        """Return the task vectors of a chunk, as `Backend.task_vectors` says."""
        if not chunk.has_base or not chunk.is_narrow:
            return super().task_vectors(chunk, room)
        out = room()
        chunk.check_bits(cache.task_vectors(chunk.rows(), out))
        return out

    def products(self, chunk: RawChunk, *, with_base: bool = True) -> BlockSums:
        """Return inner products block by block, as `Backend.products` says."""
        found = None
        if chunk.files is not None and chunk.files.dtype in LOOP_DTYPES:
            with chunk.files.reading(chunk.start) as reading:
                found = _products(reading, chunk.num_elements, with_base)
        if found is None and chunk.has_base and chunk.is_narrow:
            found = _products(in_memory(chunk.rows()), chunk.num_elements, with_base)
        if found is None:
            return super().products(chunk, with_base=with_base)
        # A square is finite only if what is squared is.
        chunk.check(0.0 if np.isfinite(found).all() else math.nan)
        return found

    def mix(
        self, start: int, count: int, generator: CounterGenerator, edges: Edges, tasks: PerTask
    ) -> UInt8[np.ndarray, " count"]:
        """Return a task for each element, as `Backend.mix` says."""
        owner, scratch = np.empty(count, np.uint8), np.empty((2, cache.BLOCK + cache.SPARE), np.int64)
        table = _mix_table(edges, tasks)
        cache.mix(start, *generator.constants(0), edges, tasks, table, owner, scratch)
        return owner

    def drop(
        self, start: int, count: int, generator: CounterGenerator, streams: Sequence[int], most: MostKeys
    ) -> UInt8[np.ndarray, "bytes count"]:
        """Return a bit for every task and element that is kept, as `Backend.drop` says."""
        kept = np.empty(((len(streams) + 3) // 4, count), dtype=np.uint8)
        cache.drop(start, np.array([generator.constants(stream) for stream in streams]), most, kept)
        return kept

    def scores(self, chunk: RawChunk, numbers: PerTaskRows) -> Vectors:
        """Return how much each task claims each element, as `Backend.scores` says."""
        out = np.empty((numbers.shape[1], chunk.num_elements), np.uint32)
        chunk.check_bits(cache.write_scores(chunk.bits(), numbers, out))
        return out.view(np.float32)

    def spreads(self, chunk: RawChunk, active: Tasks, out: Spreads) -> None:
        """Write how far the elements of some tasks differ, as `Backend.spreads` says."""
        chunk.check_bits(cache.write_spreads(chunk.bits(), active, out))

    def square_sums(self, chunk: RawChunk, spread: Spreads, least: np.float32, out: SquareSums) -> None:
        """Write sums of squares, as `Backend.square_sums` says."""
        cache.write_square_sums(chunk.bits(), spread, least, np.empty(cache.LANES), out)

    def factors_by_rank(
        self,
        start: int,
        chunk: RawChunk,
        generator: CounterGenerator,
        streams: Sequence[int],
        table: RankTable,
    ) -> Float32[np.ndarray, "tasks chunk"]:
        """Return what each element is multiplied by, as `Backend.factors_by_rank` says."""
        stored, length = chunk.bits(), (table.most.shape[1] + 1) // 2
        constants = np.array([generator.constants(stream) for stream in streams])
        out = np.empty((len(table.most), chunk.num_elements), np.float32)
        if stored.rows.dtype == np.uint16:
            room = Ranking.of_rows(length, cache.LANES)
            most = cache.write_binned_factors(stored, start, constants, *table, room, out)
        else:
            most = _write_sorted_factors(stored, start, constants, table, out)
        chunk.check_bits(most)
        return out

    def magnitude_sums(self, chunk: RawChunk, factors: Vectors, length: int) -> RowSums:
        """Return sums of the magnitudes of rows, as `Backend.magnitude_sums` says."""
        out = np.empty((2, len(factors), chunk.num_elements // length))
        factors = np.ascontiguousarray(factors)
        cache.write_magnitude_sums(chunk.bits(), factors, length, np.empty(cache.LANES), out)
        return out

    def rank(self, chunk: RawChunk, wanted: PerTask, owner: Owners, codes: Codes) -> None:
        """Write winners and codes, as `Backend.rank` says."""
        if 8 * codes.itemsize > _CODE_BITS:
            super().rank(chunk, wanted, owner, codes)
        else:
            chunk.check_bits(cache.rank(chunk.bits(), wanted, owner, codes))

    def count(self, owner: Owners, value: int) -> int:
        """Return the number of elements that an owner holds."""
        return cache.count(owner, np.uint8(value))

    def part(self, owner: Owners, codes: Codes, value: int, bits: int, name: int) -> int:
        """Rename elements whose codes have none of some bits, as `Backend.part` says."""
        if 8 * codes.itemsize > _CODE_BITS:
            return super().part(owner, codes, value, bits, name)
        return cache.part(owner, codes, np.uint8(value), np.uint32(bits), np.uint8(name))

    def draw(self, owner: Owners, codes: Codes, draw: Draw, room: int) -> Places:
        """Give elements to their heirs, as `Backend.draw` says."""
        if 8 * codes.itemsize > _CODE_BITS:
            return super().draw(owner, codes, draw, room)
        what, scratch = draw._replace(mask=np.uint32(draw.mask)), _scratch()
        while True:  # again where there is no room: what is given away already stays so
            places = np.empty(room, np.int64)
            between = cache.draw(owner, codes, what, places, *scratch)
            if between <= room:
                return places[:between]
            room = between

    def histogram(self, chunk: RawChunk, histograms: Histograms, rule: Any = None) -> bool:
        """Add magnitudes to histograms, as `Backend.histogram` says."""
        merging = chunk.one_pass if rule is not None else None
        size = chunk.num_elements
        found = histograms, np.empty(size if merging else 0, np.uint8), *_scratch()
        if merging is not None:
            largest = merging.merge(cache.count_and_merge, found, rule)
        else:
            largest = cache.count_magnitudes(chunk.bits(), size, *found)
        chunk.check_bits(largest)
        return merging is not None

    def rename(self, owner: Owners, names: Names) -> None:
        """Turn every owner into its entry of `names`."""
        cache.rename(owner, names)

    def look(
        self,
        part: Iterable[tuple[int, RawChunk]],
        contest: Contest,
        owner: Owners,
        rule_of: RuleOf | None = None,
    ) -> Sight:
        """Write winners and collect elements near a tie, as `Backend.look` says."""
        num_tasks, size = len(contest.active), 0
        counts, largest, kept = np.zeros(256, np.int64), np.zeros(2, np.int64), Kept(num_tasks)
        scratch = (
            np.zeros((num_tasks, cache.LANES), np.float32),
            np.zeros((num_tasks, cache.LANES)),
            np.empty((3, cache.LANES), np.int64),
            np.empty(cache.BLOCK + cache.SPARE, np.int64),
        )
        for start, chunk in part:
            if size < chunk.num_elements:  # memory that is not written to costs nothing
                size = chunk.num_elements
                places, values = np.empty(size, np.int64), np.empty((size, num_tasks), np.float32)
            winners = owner[start : start + chunk.num_elements]
            merging = chunk.one_pass if rule_of is not None else None
            tasks = np.empty(chunk.num_elements if merging else 0, np.uint8)  # which the loop fills
            found = Found(winners, tasks, counts, largest, places, values, *scratch)
            if merging is not None and rule_of is not None:
                number = merging.merge(cache.look_and_merge, (contest, found), rule_of(tasks))
            else:
                stored = chunk.bits()
                number = cache.look(stored, contest, found, np.float32(0), stored.rows[:0])
            chunk.check_bits(int(largest[0]))
            kept.add(places[:number] + start, values[:number])
        return Sight(counts, float(largest[:1].astype(np.int32).view(np.float32)[0]), kept)


def _write_sorted_factors(
    stored: Bits, start: int, constants: np.ndarray, table: RankTable, out: Vectors
) -> int:
    """Write what each element is multiplied by, and return the largest bits met; rows are sorted."""
    length, most = (table.most.shape[1] + 1) // 2, 0
    padded = -(-length // cache.LANES) * cache.LANES
    bits, keys = np.empty(padded, np.uint32), np.empty(padded, np.int64)
    step = max(1, cache.SORTED // length) * length
    for begin in range(0, out.shape[1], step):
        part = out[:, begin : begin + step]
        entries = np.empty((part.shape[1] // length, length), np.uint64)
        for task, found in enumerate(part):
            met = cache.write_entries(stored, task * stored.stride, begin, bits, entries)
            most = max(most, met)
            entries.sort(axis=1)
            own = table.most[task], table.factors[task]
            stream, upper = constants[task // 2], task % 2
            cache.write_factors(entries, start + begin, stream, upper, *own, keys, found)
    return most


def _scratch() -> tuple[np.ndarray, np.ndarray]:
    """Return places and marks of a block."""
    return np.empty(cache.BLOCK + cache.SPARE, np.int64), np.empty(cache.BLOCK, np.uint8)


def _merge(
    op: Op, chunk: RawChunk, inputs: Inputs, dtype: str, scaling: float, *, from_files: bool
) -> Merged | None:
    """Merge a chunk by its loop; None where a file is too short."""
    if from_files:
        assert chunk.files is not None
        place = chunk.files.reading(chunk.start)
    else:
        place = nullcontext(in_memory(chunk.rows(dtype)))
    with place as reading:
        out = np.empty(chunk.num_elements, reading.memory.dtype)
        merging = merging_of(op, inputs, scaling, len(reading.memory) - 1, out)
        largest = cache.merge_chunk(reading, merging)
    if largest < 0:
        return None
    found = Stored(out, "BF16" if out.dtype == np.uint16 else "F32")
    finite = largest < INFINITY_BITS
    if found.dtype != dtype:
        found = Stored.of(found.tensor.to(torch_dtype(dtype)))
        finite = finite and found.is_finite()
    return Merged(found, merging.counts if op.selects else merging.counts[:0], 0.0 if finite else math.nan)


def _products(reading: Reading, num_elements: int, with_base: bool) -> BlockSums | None:
    """Return inner products by their loop; None where a file is too short."""
    count = len(reading.memory) - (not with_base)
    found = np.empty((num_pairs(count), -(-num_elements // BLOCK)))
    moved = np.empty((len(reading.memory), ROWS * cache.LANES), np.float32)
    sums = np.zeros((GROUPS, count * count * cache.LANES))
    status = cache.add_products(reading, num_elements, int(not with_base), moved, sums, found)
    return found if status == 0 else None


def in_memory(rows: np.ndarray) -> Reading:
    """Return the source of a chunk whose bits are in memory."""
    nothing = np.empty(0, np.int64)
    return Reading(np.empty(0, np.int32), nothing, nothing, 0, rows, rows.reshape(-1))


def merging_of(op: Op, inputs: Inputs, scaling: float, num_tasks: int, out: np.ndarray) -> Merging:
    """Return the merge of a chunk into `out` by an operation that has a loop."""
    per_task, per_element = inputs.per_task, inputs.per_element
    return Merging(
        KINDS[op],
        np.stack([np.asarray(values) for values in per_task]) if per_task else np.empty((0, 0), np.float32),
        np.atleast_2d(np.asarray(per_element[0]).T) if per_element else np.empty((0, 0), np.uint8),
        np.float32(scaling),
        out,
        np.zeros(num_tasks, np.int64),
        np.empty((num_tasks, cache.LANES), np.int32),
        np.empty(cache.BLOCK, np.uint8),
    )


def _mix_table(edges: Edges, tasks: PerTask) -> np.ndarray:
    """Return the task that the high bits of a key stand for, 255 where an edge lies among such keys."""
    cells = (edges >> np.uint64(64 - cache.MIX_BITS)).astype(np.int64)
    lengths = np.diff(np.concatenate(([0], cells, [1 << cache.MIX_BITS])))
    table = np.repeat(tasks[: len(lengths)], lengths)
    table[cells] = 255
    return table
