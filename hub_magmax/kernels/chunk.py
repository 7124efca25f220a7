"""One chunk of a tensor: stored values of every checkpoint, as backends read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
from jaxtyping import Float32, Shaped
from numpy.lib.stride_tricks import as_strided

from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.kernels.ops import task_vectors
from hub_magmax.kernels.stored import Stored
from hub_magmax.kernels.structures import Bits, Reading

#: Dtypes whose bits compiled loops read and write.
LOOP_DTYPES = ("BF16", "F32")
#: Dtypes that float32 holds exactly.
NARROW_DTYPES = ("BF16", "F16", "F32")
#: Bits of infinity as float32. Bits of non-negative floats sort like the numbers; those of NaN lie above.
INFINITY_BITS = 0x7F800000


class Files(Protocol):
    """The place of one tensor in files that are open, a row for each checkpoint.

    Attributes:
        dtype: Of all rows, as safetensors calls it.
    """

    dtype: str

    def reading(self, start: int) -> AbstractContextManager[Reading]:
        """Give the files to loops that read from the element `start` on; time that they take is noted."""
        ...

    def raise_for(self, parts: Sequence[tuple[int, int]]) -> NoReturn:
        """Raise CheckpointError or SourceError for elements that a loop could not read, naming the file."""
        ...


class OnePass(Protocol):
    """A chunk that one loop reads, surveys and merges."""

    def merge(self, loop: Callable[..., int], looking: tuple[Any, ...], rule: Any) -> int:
        """Call a loop of `compiled.one_pass`, and return what it returns.

        Args:
            loop: Takes what it reads from, `looking`, and what it merges with.
            looking: What else it looks with.
            rule: A method's, right for every element that the loop does not find open.

        Raises:
            CheckpointError, SourceError: If not all of it could be read.
        """
        ...


@dataclass
class RawChunk:
    """Some elements of one tensor of the base model and of every task; one thread's.

    Values lie in memory that is used again for the next chunk.

    Attributes:
        parts: Bounds of the elements, from one to before another, one part after the other.
        read: Returns a row of values per checkpoint, the base model's first; together if of one dtype.
        files: Replaces `read` for loops that read files themselves.
        checked_by: Takes what `check` does, and the chunk. An attribute that held the chunk would keep its
            values in memory until the interpreter looks for cycles.
        one_pass: Merges the chunk while a loop surveys it; nothing has been read then.
        has_base: False where rows are task vectors, without a base model.
        below: Its values, where rows are task vectors and it is known.
    """

    parts: Sequence[tuple[int, int]]
    read: Callable[[], Stored | list[Stored]]
    files: Files | None = None
    checked_by: Callable[[float, RawChunk], None] = lambda probe, chunk: None
    one_pass: OnePass | None = None
    has_base: bool = True
    below: Float32[np.ndarray, " chunk"] | None = None
    _stored: Stored | list[Stored] | None = None

    @classmethod
    def of_vectors(
        cls,
        vectors: Float32[np.ndarray, "tasks chunk"],
        base: Float32[np.ndarray, " chunk"] | None = None,
    ) -> RawChunk:
        """Return task vectors that are known to be finite, and the base model's values if known."""
        rows = Stored(vectors.view(np.uint32), "F32")
        return cls([(0, vectors.shape[1])], lambda: rows, has_base=False, below=base)

    @property
    def start(self) -> int:
        return self.parts[0][0]

    @property
    def num_elements(self) -> int:
        return sum(stop - start for start, stop in self.parts)

    @property
    def is_read(self) -> bool:
        """Whether the values are in memory already."""
        return self._stored is not None

    @property
    def stored(self) -> Stored | list[Stored]:
        """The rows, read when they are first asked for."""
        if self._stored is None:  # no cached_property: threads would wait for each other's reading
            self._stored = self.read()
        return self._stored

    @property
    def values(self) -> list[torch.Tensor]:
        """The rows as torch tensors."""
        rows = self.stored
        return [*rows.tensor] if isinstance(rows, Stored) else [row.tensor for row in rows]

    @property
    def base(self) -> torch.Tensor:
        return self.values[0]

    @property
    def checkpoints(self) -> list[torch.Tensor]:
        return self.values[1:]

    @property
    def is_narrow(self) -> bool:
        """Whether float32 holds all values."""
        rows = self.stored
        return all(row.dtype in NARROW_DTYPES for row in ([rows] if isinstance(rows, Stored) else rows))

    def check(self, probe: float) -> None:
        """Raise NonFiniteError if a number, which is finite only if all values are, is not."""
        self.checked_by(probe, self)

    def rows(self, dtype: str | None = None) -> np.ndarray:
        """Return the bits of all narrow rows: as stored where loops can read them, else of float32.

        Args:
            dtype: If given, stored bits are returned in this dtype alone.
        """
        found = self.stored
        if isinstance(found, Stored) and found.dtype in LOOP_DTYPES and dtype in (None, found.dtype):
            return found.bits
        return Stored.of(torch.stack([values.float() for values in self.values])).bits

    def bits(self) -> Bits:
        """Return the values for loops over a whole tensor; of wide values the task vectors.

        Raises:
            NonFiniteError: If task vectors that are formed here are not finite.
        """
        if self.has_base and self.is_narrow:
            memory, stride = memory_of(self.rows())
            return Bits(memory[stride:], stride, memory[: self.num_elements])
        return Bits(*memory_of(self.task_vectors().view(np.uint32)), np.empty(0, np.uint32))

    def task_vectors(self) -> Float32[np.ndarray, "tasks chunk"]:
        """Return the task vectors, formed by torch where there is a base model.

        Raises:
            NonFiniteError: If they are not finite.
        """
        if not self.has_base:
            return self.rows().view(np.float32)
        vectors = task_vectors(self.base, self.checkpoints)
        self.check(float(vectors.sum()))
        found: Float32[np.ndarray, "tasks chunk"] = vectors.numpy()
        return found

    def vectors(self) -> Float32[np.ndarray, "vectors chunk"]:
        """Return the base model's values, zeros where they are not known, and the task vectors.

        Raises:
            NonFiniteError: If they are not finite.
        """
        moved = self.task_vectors()
        base = self.base.float().numpy() if self.has_base else self.below
        return np.concatenate([np.zeros_like(moved[:1]) if base is None else base[None], moved])

    def check_bits(self, largest: int) -> None:
        """Raise NonFiniteError if the largest magnitude that a loop met, as bits, is not finite."""
        self.check(0.0 if largest < INFINITY_BITS else math.nan)

    def element(self, place: int) -> int:
        """Return the index in the tensor of what is at a place in the rows."""
        for start, stop in self.parts:
            if place < stop - start:
                return start + place
            place -= stop - start
        raise IndexError(place)


def memory_of(block: Shaped[np.ndarray, "tasks block"]) -> tuple[np.ndarray, int]:
    """Return the memory from a block's first row to its last, for a compiled loop, and their distance.

    Rows may be parts of longer ones. Where the elements of a row do not lie side by side, rows are copied.
    """
    size = block.itemsize
    if block.strides[1] != size or block.strides[0] % size:
        block = np.ascontiguousarray(block)
    stride, length = block.strides[0] // size, block.shape[1]
    return as_strided(block, ((block.shape[0] - 1) * stride + length,), (size,)), stride
