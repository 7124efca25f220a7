"""One pass from stored values to merged values: as one compiled loop where that pays.

Measured on one thread, 2^18 elements, five bfloat16 checkpoints: operation by operation a pass costs 60 to
140 ns per element, because every operation moves the chunk through memory; compiled it costs 1 to 3 ns.
Compiling takes about ten seconds, once per environment. Both ways give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from hub_magmax import dropping, kernels, loops, selection
from hub_magmax.methods import TensorRule
from hub_magmax.passes import Merged, Pass

if TYPE_CHECKING:
    from hub_magmax.streaming import StoredChunk

#: Merging so many elements takes longer operation by operation than compiling does ...
COMPILE_ABOVE_ELEMENTS = 2**27
#: ... and so many longer than loading what was compiled, a twentieth of a second; where only a part of it
#: was, the rest is compiled, once.
LOAD_ABOVE_ELEMENTS = 2**21

#: Dtypes that compiled passes read and write, and what holds their bits.
_BITS = {torch.bfloat16: (torch.int16, np.uint16), torch.float32: (torch.int32, np.uint32)}
#: Dtypes that float32 holds exactly.
_NARROW = (torch.bfloat16, torch.float16, torch.float32)

#: Instead of what files are read by, where values were read already.
_NO_FILES = (np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64), 0)

#: Merges a chunk, given what the rule knows of each of its elements.
Step = Callable[["StoredChunk", tuple[Tensor, ...]], Merged]


def compiles(num_elements: int) -> bool:
    """Say whether a merge of so many elements is worth compiled passes: waiting for them, or loading them."""
    if num_elements < LOAD_ABOVE_ELEMENTS:
        return False
    return num_elements >= COMPILE_ABOVE_ELEMENTS or _is_compiled()


def _is_compiled() -> bool:
    return loops.merge_chunk.is_kept()


def make_step(rule: TensorRule, dtype: torch.dtype, scaling: float, *, is_compiled: bool) -> Step:
    """Return what merges the chunks of a tensor.

    Args:
        rule: Of the tensor.
        dtype: Of the output.
        scaling: Scaling coefficient.
        is_compiled: Use a compiled pass where there is one for the rule.
    """
    step = Pass(rule.combine, rule.selects, dtype)
    factor = torch.tensor(scaling, dtype=torch.float64)

    def eager(chunk: StoredChunk, per_element: tuple[Tensor, ...]) -> Merged:
        return step(chunk.base, chunk.checkpoints, per_element, rule.per_task, factor)

    kind = _kind(rule) if is_compiled and dtype in _NARROW else None
    if kind is None:
        return eager
    fast = _CompiledPass(kind, rule, dtype, scaling)

    def either(chunk: StoredChunk, per_element: tuple[Tensor, ...]) -> Merged:
        found, files = None, chunk.files
        if files is not None and files.dtype == dtype and dtype in _BITS:
            offset, block = files.block(chunk.start)
            with files.arguments() as arguments:
                found = fast(block, per_element, chunk.num_elements, (*arguments, offset))
        if found is None and is_narrow(chunk):
            found = fast(stored_rows(chunk, dtype), per_element, chunk.num_elements)
        return eager(chunk, per_element) if found is None else found

    return either


def _kind(rule: TensorRule) -> int | None:
    """Return the number of the rule's compiled pass, or None where there is none, as for a plugin's rule."""
    if rule.combine is kernels.given:
        return loops.GIVEN if rule.selects else None
    kinds = {
        kernels.weighted_sum: loops.WEIGHTED,
        kernels.agreeing_sum: loops.AGREEING,
        kernels.ties_merge: loops.TIES,
        kernels.banded_sum: loops.BAND,
        dropping.dropped_sum: loops.DROPPED,
        dropping.dropped_ties: loops.DROPPED_TIES,
        selection.largest_magnitude: loops.LARGEST,
    }
    return kinds.get(rule.combine)


@dataclass(frozen=True)
class _CompiledPass:
    """A compiled pass over chunks; attributes as `make_step` has them."""

    kind: int
    rule: TensorRule
    dtype: torch.dtype
    scaling: float

    def __call__(
        self,
        rows: Tensor,
        per_element: tuple[Tensor, ...],
        num_elements: int,
        files: tuple[np.ndarray, np.ndarray, np.ndarray, int] = _NO_FILES,
    ) -> Merged | None:
        """Merge `rows`, or what is read into them from files in blocks; None where a file is too short."""
        num_tasks, per_task = len(rows) - 1, self.rule.per_task
        merged = torch.empty(num_elements, dtype=rows.dtype)
        counts = np.zeros(num_tasks, np.int64)
        largest = loops.merge_chunk(
            self.kind,
            *files,
            bits_of(rows),
            torch.stack(per_task).numpy() if per_task else np.empty((0, 0), np.float32),
            np.atleast_2d(per_element[0].numpy().T) if per_element else np.empty((0, 0), np.uint8),
            np.float32(self.scaling),
            bits_of(merged),
            counts,
            np.empty((num_tasks + 6, loops.BLOCK), np.float32),
            np.empty((2, loops.BLOCK), np.int32),
        )
        if largest < 0:
            return None
        finite = largest < loops.INFINITY_BITS
        if rows.dtype != self.dtype:
            merged = merged.to(self.dtype)
            finite = finite and bool(torch.isfinite(merged).all())
        found = torch.from_numpy(counts) if self.rule.selects else torch.empty(0, dtype=torch.int64)
        return merged, found, 0.0 if finite else math.nan


def stored_rows(chunk: StoredChunk, dtype: torch.dtype | None = None) -> Tensor:
    """Return a chunk's values, the base model's in the first row: as stored where a compiled pass can read
    them and, if `dtype` is given, write them in that dtype; else in float32.
    """
    rows = chunk.rows
    if rows is not None and rows.dtype in _BITS and dtype in (None, rows.dtype):
        return rows
    return torch.stack([values.float() for values in (chunk.base, *chunk.checkpoints)])


def bits_of(values: Tensor) -> np.ndarray:
    """Return bfloat16 as uint16 and float32 as uint32; the same memory."""
    signed, unsigned = _BITS[values.dtype]
    bits: np.ndarray = values.view(signed).numpy().view(unsigned)
    return bits


def bits(chunk: StoredChunk, check: Callable[[float], None]) -> selection.Bits:
    """Return a chunk for loops over a whole tensor; `check` gets a number, finite only if all values are."""
    rows = bits_of(stored_rows(chunk))
    num_elements = chunk.num_elements
    return selection.Bits(
        rows[1:].reshape(-1),
        num_elements,
        rows[0],
        num_elements,
        lambda largest: check(_probe(largest)),
    )


def _probe(largest: int) -> float:
    """Return a number that is finite if the bits of the largest magnitude are."""
    return 0.0 if largest < loops.INFINITY_BITS else math.nan


def is_narrow(chunk: StoredChunk) -> bool:
    """Say whether compiled passes can read a chunk's values."""
    rows = chunk.values
    return all(v.dtype in _NARROW for v in ([rows] if isinstance(rows, Tensor) else rows))


def task_vectors(chunk: StoredChunk, out: Float32[Tensor, "tasks chunk"]) -> float:
    """Write a chunk's task vectors by a compiled pass; return a number that is finite only if they are."""
    largest = loops.task_vectors(bits_of(stored_rows(chunk)), out.numpy(), np.empty(loops.BLOCK, np.float32))
    return _probe(largest)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: work is shared between threads by tensor, and more would be in the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
