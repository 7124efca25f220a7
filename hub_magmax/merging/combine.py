"""One pass from stored values to merged values: as one compiled loop where that pays.

Measured on one thread, 2^18 elements, five bfloat16 checkpoints: operation by operation a pass costs 60 to
140 ns per element, because every operation moves the chunk through memory; compiled it costs .5 to 1.5 ns.
Compiling takes six to fifteen seconds, once per environment. Both ways give the same bits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32

from hub_magmax.checkpoints.stored import Stored, torch_dtype
from hub_magmax.kernels import reference
from hub_magmax.kernels.compiled import cache
from hub_magmax.kernels.lazy_imports import Array, is_imported, torch
from hub_magmax.merging.passes import Merged, Pass
from hub_magmax.methods import TensorRule, draws, selection

if TYPE_CHECKING:
    from hub_magmax.merging.chunk import StoredChunk

#: Merging so many elements takes longer operation by operation than compiling does ...
COMPILE_ABOVE_ELEMENTS = 2**27
#: ... and so many longer than loading what was compiled, a twentieth of a second; where only a part of it
#: was, the rest is compiled, once.
LOAD_ABOVE_ELEMENTS = 2**21

#: Dtypes that compiled passes read and write.
COMPILED_DTYPES = ("BF16", "F32")
#: Dtypes that float32 holds exactly.
_NARROW = ("BF16", "F16", "F32")

#: What a rule without a number for each element gives.
_NOTHING_GIVEN = np.empty((0, 0), np.uint8)
#: Instead of what files are read by, where values were read already.
_NO_FILES = (np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64), 0)

#: Merges a chunk, given what the rule knows of each of its elements.
Step = Callable[["StoredChunk", tuple[Array, ...]], Merged]


def compiles(num_elements: int) -> bool:
    """Say whether a merge of so many elements is worth compiled passes: waiting for them, or loading them."""
    if num_elements < LOAD_ABOVE_ELEMENTS:
        return False
    return num_elements >= COMPILE_ABOVE_ELEMENTS or _is_compiled()


def _is_compiled() -> bool:
    return cache.merge_chunk.is_kept()


def make_step(rule: TensorRule, dtype: str, scaling: float, *, is_compiled: bool) -> Step:
    """Return what merges the chunks of a tensor.

    Args:
        rule: Of the tensor.
        dtype: Of the output, as safetensors calls it.
        scaling: Scaling coefficient.
        is_compiled: Use a compiled pass where there is one for the rule.
    """
    step = Pass(rule.combine, rule.selects, dtype)

    def eager(chunk: StoredChunk, per_element: tuple[Array, ...]) -> Merged:
        factor = torch.tensor(scaling, dtype=torch.float64)
        return step(chunk.base, chunk.checkpoints, per_element, rule.per_task, factor)

    kind = kind_of(rule) if is_compiled and dtype in _NARROW else None
    if kind is None:
        return eager
    fast = _CompiledPass(kind, rule, dtype, scaling)

    def either(chunk: StoredChunk, per_element: tuple[Array, ...]) -> Merged:
        found, files = None, chunk.files
        if files is not None and files.dtype == dtype and dtype in COMPILED_DTYPES:
            offset, block = files.block(chunk.start)
            with files.arguments() as arguments:
                found = fast(block, per_element, chunk.num_elements, (*arguments, offset))
        if found is None and is_narrow(chunk):
            found = fast(stored_rows(chunk, dtype), per_element, chunk.num_elements)
        return eager(chunk, per_element) if found is None else found

    return either


def kind_of(rule: TensorRule) -> int | None:
    """Return the number of the rule's compiled pass, or None where there is none, as for a plugin's rule."""
    if rule.combine is reference.given:
        return cache.GIVEN if rule.selects else None
    kinds = {
        reference.weighted_sum: cache.WEIGHTED,
        reference.agreeing_sum: cache.AGREEING,
        reference.ties_merge: cache.TIES,
        reference.banded_sum: cache.BAND,
        draws.dropped_sum: cache.DROPPED,
        draws.dropped_ties: cache.DROPPED_TIES,
        selection.largest_magnitude: cache.LARGEST,
    }
    return kinds.get(rule.combine)


@dataclass(frozen=True)
class _CompiledPass:
    """A compiled pass over chunks; attributes as `make_step` has them."""

    kind: int
    rule: TensorRule
    dtype: str
    scaling: float

    def __call__(
        self,
        rows: np.ndarray,
        per_element: tuple[Array, ...],
        num_elements: int,
        files: tuple[np.ndarray, np.ndarray, np.ndarray, int] = _NO_FILES,
    ) -> Merged | None:
        """Merge `rows`, or what is read into them from files in blocks; None where a file is too short."""
        out = np.empty(num_elements, rows.dtype)
        per_task, *others = merging_arguments(self.rule, self.scaling, len(rows) - 1, out)
        merged, counts = others[1:3]
        given = np.atleast_2d(np.asarray(per_element[0]).T) if per_element else _NOTHING_GIVEN
        largest = cache.merge_chunk(self.kind, *files, rows, per_task, given, *others)
        if largest < 0:
            return None
        found = Stored(merged, "BF16" if merged.dtype == np.uint16 else "F32")
        finite = largest < cache.INFINITY_BITS
        if found.dtype != self.dtype:
            found = Stored.of(found.tensor.to(torch_dtype(self.dtype)))
            finite = finite and found.is_finite()
        return found, counts if self.rule.selects else counts[:0], 0.0 if finite else math.nan


def merging_arguments(rule: TensorRule, scaling: float, num_tasks: int, out: np.ndarray) -> tuple[Any, ...]:
    """Return most of what `loops.merge_chunk` takes: numbers per task, the scaling coefficient, room for
    merged elements (`out`) and for counts, and scratch.
    """
    per_task = rule.per_task
    return (
        np.stack([np.asarray(values) for values in per_task]) if per_task else np.empty((0, 0), np.float32),
        np.float32(scaling),
        out,
        np.zeros(num_tasks, np.int64),
        np.empty((num_tasks, cache.LANES), np.int32),
        np.empty(cache.BLOCK, np.uint8),
    )


def stored_rows(chunk: StoredChunk, dtype: str | None = None) -> np.ndarray:
    """Return the bits of a chunk's values, the base model's in the first row: as stored where a compiled pass
    can read them and, if `dtype` is given, write them in that dtype; else in float32.
    """
    found = chunk.stored
    if isinstance(found, Stored) and found.dtype in COMPILED_DTYPES and dtype in (None, found.dtype):
        return found.bits
    return Stored.of(torch.stack([values.float() for values in chunk.values])).bits


def bits(chunk: StoredChunk, check: Callable[[float], None]) -> selection.Bits:
    """Return a chunk for loops over a whole tensor; `check` gets a number, finite only if all values are."""
    rows = stored_rows(chunk)
    num_elements = chunk.num_elements
    return selection.Bits(
        rows[1:].reshape(-1),
        num_elements,
        rows[0],
        num_elements,
        lambda largest: check(_probe(largest)),
    )


def unread_bits(
    num_elements: int, check: Callable[[float], None], early: selection.EarlyChunk
) -> selection.Bits:
    """Return what `bits` does of a chunk that is yet to be read."""
    nothing = np.empty(0, np.uint32)
    return selection.Bits(nothing, 0, nothing, num_elements, lambda largest: check(_probe(largest)), early)


def _probe(largest: int) -> float:
    """Return a number that is finite if the bits of the largest magnitude are."""
    return 0.0 if largest < cache.INFINITY_BITS else math.nan


def is_narrow(chunk: StoredChunk) -> bool:
    """Say whether compiled passes can read a chunk's values."""
    rows = chunk.stored
    return all(row.dtype in _NARROW for row in ([rows] if isinstance(rows, Stored) else rows))


def task_vectors(chunk: StoredChunk, out: Float32[np.ndarray, "tasks chunk"]) -> float:
    """Write a chunk's task vectors by a compiled pass; return a number that is finite only if they are."""
    return _probe(cache.task_vectors(stored_rows(chunk), out))


def num_threads() -> int:
    """Return how many threads to work with: as many as torch does, or would."""
    if is_imported():
        return torch.get_num_threads()
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdecimal() and int(limit):
        return int(limit)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: work is shared between threads by tensor, and more would be in the way."""
    if not is_imported():
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
