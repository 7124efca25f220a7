"""A tensor's task vectors in chunks, as rules read them, and the selection that a rule returns."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from hub_magmax.errors import RecipeError
from hub_magmax.kernels.arrays import IN_MEMORY, Scratch
from hub_magmax.kernels.backend import Backend
from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.lazy_imports import Array, torch
from hub_magmax.kernels.reference import Reference
from hub_magmax.methods.factors import Factors

T = TypeVar("T")

# Elements decided at a time: temporaries of this size stay in the cache.
BLOCK_ELEMENTS = 1 << 16


class Counted(Protocol):
    """Numbers of tasks, read in chunks, among which those of given ranks are found."""

    @property
    def num_tasks(self) -> int: ...

    @property
    def num_elements(self) -> int: ...

    @property
    def backend(self) -> Backend: ...

    def runs(self, length: int, every: int) -> Float32[np.ndarray, "tasks in_runs"]: ...

    def map(
        self, work: Callable[[Iterator[tuple[int, RawChunk]]], T], *, is_early: bool = False
    ) -> Iterator[T]: ...


@runtime_checkable
class Remembering(Protocol):
    """Chunks of a tensor that merges for several sites survey, one after the other."""

    def recall(self, question: Hashable, find: Callable[[], T]) -> T:
        """Return what `find` gave before for the same values and the same question, or gives now."""
        ...


@runtime_checkable
class Chunks(Protocol):
    """One tensor's stacked task vectors, flattened, in order; iterating starts from the beginning.

    Yields the index of a chunk's first element and the chunk, on the CPU. Values must be finite.
    A chunk keeps its values until the next one is asked for. The backend changes how long a rule takes, and
    nothing else.
    """

    @property
    def num_tasks(self) -> int: ...

    @property
    def num_elements(self) -> int: ...

    @property
    def backend(self) -> Backend:
        """The arithmetic that a rule surveys the tensor with."""
        ...

    @property
    def num_threads(self) -> int:
        """Threads that a rule may work with."""
        ...

    @property
    def has_base(self) -> bool:
        """Whether the base model's values are known, besides the task vectors."""
        ...

    @property
    def scratch(self) -> Scratch:
        """The place of arrays with a number for each element."""
        ...

    def __iter__(self) -> Iterator[tuple[int, Float32[torch.Tensor, "tasks chunk"]]]: ...

    def arrays(self) -> Iterator[tuple[int, Float32[np.ndarray, "tasks chunk"]]]:
        """Yield the same as NumPy arrays."""
        ...

    def runs(self, length: int, every: int) -> Float32[np.ndarray, "tasks in_runs"]:
        """Return the first `length` elements of every `every`, those that `places_in_runs` names."""
        ...

    def map(
        self,
        work: Callable[[Iterator[tuple[int, RawChunk]]], T],
        *,
        is_early: bool = False,
        multiple_of: int = 1,
    ) -> Iterator[T]:
        """Share the chunks out between threads, as stored, and yield what `work` returns.

        It is called once in each thread, with the thread's share in order; most often there is one thread.
        `is_early`: it merges chunks while it surveys them, where they have `RawChunk.one_pass`.
        `multiple_of`: every chunk of a tensor but its last one has a multiple of so many elements.
        """
        ...

    def factors(self, tasks: Sequence[int]) -> list[Factors] | None:
        """Return the task vectors of some tasks as products, where all of them are known as such."""
        ...


@dataclass(frozen=True)
class ArrayChunks:
    """Task vectors in memory, float32 and stacked, cut into chunks of `chunk_elements`.

    Attributes:
        base: The base model's values, float32, for methods that need them.
    """

    task_vectors: Array
    chunk_elements: int = 1 << 18
    backend: Backend = field(default_factory=Reference)
    scratch: Scratch = IN_MEMORY
    base: Array | None = None
    num_threads = 1

    @property
    def num_tasks(self) -> int:
        return self.task_vectors.shape[0]

    @property
    def num_elements(self) -> int:
        return math.prod(self.task_vectors.shape[1:])

    @property
    def has_base(self) -> bool:
        return self.base is not None

    def __iter__(self) -> Iterator[tuple[int, Float32[torch.Tensor, "tasks chunk"]]]:
        for start, chunk in self.arrays():
            yield start, torch.from_numpy(chunk)

    def runs(self, length: int, every: int) -> Float32[np.ndarray, "tasks in_runs"]:
        return self._flat.take(places_in_runs(self.num_elements, length, every), axis=1)

    def map(
        self,
        work: Callable[[Iterator[tuple[int, RawChunk]]], T],
        *,
        is_early: bool = False,
        multiple_of: int = 1,
    ) -> Iterator[T]:
        length, base = in_multiples(self.chunk_elements, multiple_of), self.below(0, self.num_elements)

        def of(start: int, chunk: np.ndarray) -> RawChunk:
            return RawChunk.of_vectors(chunk, None if base is None else base[start : start + length])

        yield work((start, of(start, chunk)) for start, chunk in self._cut(length))

    def factors(self, tasks: Sequence[int]) -> None:
        return None

    def arrays(self) -> Iterator[tuple[int, Float32[np.ndarray, "tasks chunk"]]]:
        return self._cut(self.chunk_elements)

    def below(self, start: int, stop: int) -> Float32[np.ndarray, " some"] | None:
        """Return values of the base model, where they are known."""
        return None if self.base is None else np.asarray(self.base).reshape(-1)[start:stop]

    def _cut(self, length: int) -> Iterator[tuple[int, Float32[np.ndarray, "tasks chunk"]]]:
        flat = self._flat
        for start in range(0, self.num_elements, length):
            yield start, flat[:, start : start + length]

    @property
    def _flat(self) -> Float32[np.ndarray, "tasks elements"]:
        return np.asarray(self.task_vectors).reshape(self.num_tasks, self.num_elements)


@dataclass(frozen=True)
class Selection:
    """The decision of a rule for one tensor.

    Attributes:
        owner: The task (from zero) that each element is taken from.
        counts: Elements per task; equal to the quotas.
        num_unaligned: Elements per task that `algorithm_1` filled without regard to magnitude.
        duality_gap: `top_n` only: how far at most the kept magnitude is below the optimum, as a
            fraction of it.
        prices: `top_n` only: what each task's magnitudes are lowered by before the largest wins, in
            the unit of the task vectors; the lowest is 0, and a task without a quota has infinity.
    """

    owner: UInt8[np.ndarray, " elements"]
    counts: tuple[int, ...]
    num_unaligned: tuple[int, ...]
    duality_gap: float | None = None
    prices: tuple[float, ...] | None = None

    @property
    def winners(self) -> UInt8[torch.Tensor, " elements"]:
        """`owner` as torch's, in the same memory."""
        return torch.from_numpy(self.owner)


def in_multiples(length: int, of: int) -> int:
    """Return a length as a multiple of a number: the next smaller one, but not none."""
    return max(1, length // of) * of


def places_in_runs(num_elements: int, length: int, every: int) -> Int64[np.ndarray, " in_runs"]:
    """Return which elements are among the first `length` of every `every`."""
    places = np.arange(0, num_elements, every)[:, None] + np.arange(min(length, num_elements))
    return places[places < num_elements]


def whole_vectors(chunks: Chunks) -> Float32[np.ndarray, "vectors elements"]:
    """Return the base model's values, zeros where they are not known, and the task vectors of a tensor."""
    found = np.empty((1 + chunks.num_tasks, chunks.num_elements), np.float32)

    def copy(part: Iterator[tuple[int, RawChunk]]) -> None:
        for start, chunk in part:
            vectors = chunk.vectors()
            found[:, start : start + vectors.shape[1]] = vectors

    deque(chunks.map(copy), maxlen=0)
    return found


def stacked_vectors(chunks: Chunks, tasks: Sequence[int]) -> Float32[torch.Tensor, "tasks elements"]:
    """Return a tensor's whole task vectors, those of some tasks, in memory of their own."""
    stacked = torch.empty((len(tasks), chunks.num_elements))
    for start, task_vectors in chunks:
        for row, task in zip(stacked, tasks, strict=True):
            row[start : start + task_vectors.shape[1]] = task_vectors[task]
    return stacked


def check_task_count(num_tasks: int, limit: int) -> None:
    """Raise a RecipeError if there are more tasks than a rule can tell apart."""
    if num_tasks > limit:
        what = f"this rule was given {num_tasks} tasks"
        hint = f"Merge the {limit} tasks that matter most, or choose a method that averages."
        raise RecipeError(what, where="tasks", expected=f"at most {limit}", hint=hint)


def blocks(chunks: Chunks) -> Iterator[tuple[int, Float32[np.ndarray, "tasks block"]]]:
    """Cut chunks of any size again, at multiples of the block size; a block lives as long as a chunk."""
    pieces: list[np.ndarray] = []
    start = num_pending = 0
    for _, chunk in chunks.arrays():
        taken = 0
        while taken < chunk.shape[1]:
            piece = chunk[:, taken : taken + BLOCK_ELEMENTS - num_pending]
            taken += piece.shape[1]
            num_pending += piece.shape[1]
            if num_pending == BLOCK_ELEMENTS:
                yield start, np.concatenate([*pieces, piece], axis=1) if pieces else piece
                start, num_pending, pieces = start + num_pending, 0, []
            else:
                pieces.append(piece.copy())
    if num_pending:
        yield start, np.concatenate(pieces, axis=1)
