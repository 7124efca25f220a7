"""The compiled backend: loops of machine code for built-in operations and dtypes that float32 holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8, UInt64

from hub_magmax.kernels import ops
from hub_magmax.kernels.backend import Merged
from hub_magmax.kernels.chunk import INFINITY_BITS, LOOP_DTYPES, NARROW_DTYPES, RawChunk
from hub_magmax.kernels.compiled import cache
from hub_magmax.kernels.dtypes import torch_dtype
from hub_magmax.kernels.ops import Inputs, Op
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.reference import Reference
from hub_magmax.kernels.stored import Stored

#: The number of an operation's loop.
KINDS: Mapping[Op, int] = {
    ops.WEIGHTED_SUM: cache.WEIGHTED,
    ops.AGREEING_SUM: cache.AGREEING,
    ops.TIES: cache.TIES,
    ops.BAND: cache.BAND,
    ops.DROPPED: cache.DROPPED,
    ops.DROPPED_TIES: cache.DROPPED_TIES,
    ops.LARGEST: cache.LARGEST,
    ops.CHOSEN: cache.GIVEN,
}

#: Replaces the numbers per element of operations that take none.
_NO_NUMBERS = np.empty((0, 0), np.uint8)
#: Replaces the file arguments when the values are already in memory.
_NO_FILES = (np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64))


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
            if chunk.files is not None and chunk.files.dtype == dtype and dtype in LOOP_DTYPES:
                found = _merge(op, chunk, inputs, dtype, scaling, from_files=True)
            if found is None and chunk.is_narrow:
                found = _merge(op, chunk, inputs, dtype, scaling, from_files=False)
        return super().merge(op, chunk, inputs, dtype, scaling) if found is None else found

    def task_vectors(
        self, chunk: RawChunk, room: Callable[[], np.ndarray]
    ) -> Float32[np.ndarray, "tasks chunk"]:
        """Return the task vectors of a chunk, as `Backend.task_vectors` says."""
        if not chunk.is_narrow:
            return super().task_vectors(chunk, room)
        out = room()
        chunk.check_bits(cache.task_vectors(chunk.rows(), out))
        return out

    def mix(
        self,
        start: int,
        count: int,
        generator: CounterGenerator,
        edges: UInt64[np.ndarray, " edges"],
        tasks: UInt8[np.ndarray, " tasks"],
    ) -> UInt8[np.ndarray, " count"]:
        """Return a task for each element, as `Backend.mix` says."""
        owner, scratch = np.empty(count, np.uint8), np.empty((2, cache.BLOCK + cache.SPARE), np.int64)
        table = _mix_table(edges, tasks)
        cache.mix(start, *generator.constants(0), edges, tasks, table, owner, scratch)
        return owner

    def drop(
        self, start: int, count: int, generator: CounterGenerator, streams: Sequence[int], most: np.uint32
    ) -> UInt8[np.ndarray, "bytes count"]:
        """Return a bit for every task and element that is kept, as `Backend.drop` says."""
        kept = np.empty(((len(streams) + 3) // 4, count), dtype=np.uint8)
        cache.drop(start, np.array([generator.constants(stream) for stream in streams]), most, kept)
        return kept


def _merge(
    op: Op, chunk: RawChunk, inputs: Inputs, dtype: str, scaling: float, *, from_files: bool
) -> Merged | None:
    """Merge a chunk by its loop; None where a file is too short."""
    files = chunk.files if from_files else None
    offset, rows = files.block(chunk.start) if files is not None else (0, chunk.rows(dtype))
    out = np.empty(chunk.num_elements, rows.dtype)
    per_task, *others = merging_arguments(inputs, scaling, len(rows) - 1, out)
    counts = others[2]
    given = np.atleast_2d(np.asarray(inputs.per_element[0]).T) if inputs.per_element else _NO_NUMBERS
    with files.arguments() if files is not None else nullcontext(_NO_FILES) as reading:
        largest = cache.merge_chunk(KINDS[op], *reading, offset, rows, per_task, given, *others)
    if largest < 0:
        return None
    found = Stored(out, "BF16" if out.dtype == np.uint16 else "F32")
    finite = largest < INFINITY_BITS
    if found.dtype != dtype:
        found = Stored.of(found.tensor.to(torch_dtype(dtype)))
        finite = finite and found.is_finite()
    return Merged(found, counts if op.selects else counts[:0], 0.0 if finite else math.nan)


def merging_arguments(inputs: Inputs, scaling: float, num_tasks: int, out: np.ndarray) -> tuple[Any, ...]:
    """Return most of what `cache.merge_chunk` takes: numbers per task, the scaling coefficient, room for
    merged elements (`out`) and for counts, and scratch.
    """
    per_task = inputs.per_task
    return (
        np.stack([np.asarray(values) for values in per_task]) if per_task else np.empty((0, 0), np.float32),
        np.float32(scaling),
        out,
        np.zeros(num_tasks, np.int64),
        np.empty((num_tasks, cache.LANES), np.int32),
        np.empty(cache.BLOCK, np.uint8),
    )


def _mix_table(edges: UInt64[np.ndarray, " edges"], tasks: UInt8[np.ndarray, " tasks"]) -> np.ndarray:
    """Return the task that the high bits of a key stand for, 255 where an edge lies among such keys."""
    cells = (edges >> np.uint64(64 - cache.MIX_BITS)).astype(np.int64)
    lengths = np.diff(np.concatenate(([0], cells, [1 << cache.MIX_BITS])))
    table = np.repeat(tasks[: len(lengths)], lengths)
    table[cells] = 255
    return table
