"""One tensor of all checkpoints, read in chunks and a few of them ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from threading import Lock
from typing import TypeVar

import numpy as np
from jaxtyping import Float32

from hub_magmax.checkpoints.index import TensorInfo
from hub_magmax.checkpoints.source import TensorSource, tensor_place
from hub_magmax.errors import NonFiniteError
from hub_magmax.kernels.arrays import IN_MEMORY, Scratch
from hub_magmax.kernels.backend import Backend
from hub_magmax.kernels.chunk import OnePass, RawChunk
from hub_magmax.kernels.lazy_imports import inference, torch
from hub_magmax.kernels.ops import task_vectors
from hub_magmax.kernels.reference import Reference
from hub_magmax.kernels.stored import Stored, bits_dtype
from hub_magmax.merging.ahead import ahead
from hub_magmax.merging.chunk_memory import ChunkMemory, SharedChunk
from hub_magmax.merging.parts import alone, in_runs, picked, together
from hub_magmax.merging.profile import Clock
from hub_magmax.merging.rows import FileRows
from hub_magmax.methods.chunks import in_multiples
from hub_magmax.methods.factors import Factors
from hub_magmax.text import rule_text

T = TypeVar("T")

#: Elements from run to run where reading only the runs is faster than reading all: of a disk, 128 KB are as
#: fast as 4.
_FAR_APART = 2**16


@dataclass(frozen=True)
class StoredChunks:
    """One tensor's task vectors, read from the sources again at every iteration.

    Iterating may be repeated. `last_pass` is the last look at the tensor, and releases what it passed.

    Attributes:
        reader: Runs the reads, one at a time and a few ahead of what is asked for; None reads when asked.
        backend: Surveys and merges the chunks.
        clock: Told when values are read and when they are waited for.
        memory: Holds the chunk that was read last, where no chunk is needed once the next one is read.
        shared: In its place where the thread merges a chunk for several sites; a tensor of one chunk is held
            whole.
        one_pass: Returns what merges a chunk, which is yet to be read, while it is surveyed, or None; None
            where nothing is merged before the last pass.

    Raises:
        NonFiniteError: While iterating, at the first NaN or infinity, with its place.
    """

    name: str
    num_elements: int
    base: TensorSource
    tasks: tuple[TensorSource, ...]
    chunk_elements: int
    reader: Executor | None
    backend: Backend = field(default_factory=Reference)
    memory: ChunkMemory | None = None
    clock: Clock = field(default_factory=Clock)
    scratch: Scratch = IN_MEMORY
    one_pass: Callable[[RawChunk], OnePass | None] | None = None
    shared: SharedChunk | None = None
    num_threads = 1
    has_base = True

    @property
    def num_tasks(self) -> int:
        return len(self.tasks)

    def recall(self, question: Hashable, find: Callable[[], T]) -> T:
        return JoinedChunks((self,), lambda in_part: None).recall(question, find)

    def __iter__(self) -> Iterator[tuple[int, Float32[torch.Tensor, "tasks chunk"]]]:
        for start, vectors in self.arrays():
            yield start, torch.from_numpy(vectors)

    def arrays(self) -> Iterator[tuple[int, Float32[np.ndarray, "tasks chunk"]]]:
        return self.vectors(self._chunks())

    def runs(self, length: int, every: int) -> Float32[np.ndarray, "tasks in_runs"]:
        return self.parts(in_runs(self.num_elements, length, every))

    def parts(self, bounds: Iterable[tuple[int, int]]) -> Float32[np.ndarray, "tasks in_parts"]:
        """Return parts, each from one element to before another, as task vectors side by side."""
        found = [vectors.copy() for _, vectors in self.vectors(bounds)]
        nothing = np.empty((self.num_tasks, 0), np.float32)
        return found[0] if len(found) == 1 else np.concatenate([nothing, *found], axis=1)

    def vectors(
        self, parts: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[int, Float32[np.ndarray, "tasks some"]]]:
        """Yield parts as task vectors, some of them side by side, and the index of the first element."""
        groups = alone(parts) if self._files is None else together(parts, self.chunk_elements)
        for chunk in self._stored(groups):
            yield chunk.start, self._task_vectors(chunk)

    def map(
        self,
        work: Callable[[Iterator[tuple[int, RawChunk]]], T],
        *,
        is_early: bool = False,
        multiple_of: int = 1,
    ) -> Iterator[T]:
        yield work(self.stored(is_early=is_early, multiple_of=multiple_of))

    def stored(self, *, is_early: bool = False, multiple_of: int = 1) -> Iterator[tuple[int, RawChunk]]:
        """Yield the chunks as stored, for a survey."""
        one_pass = self.one_pass if is_early else None
        chunks = self._chunks(multiple_of)
        for chunk in self._stored(alone(chunks), is_unread=one_pass is not None or multiple_of > 1):
            chunk.one_pass = one_pass(chunk) if one_pass is not None else None
            yield chunk.start, chunk
            if chunk.one_pass is not None:
                chunk.one_pass = None  # it holds the chunk, and what is open in the whole tensor
                self.release(chunk.parts[-1][1])

    def factors(self, tasks: Sequence[int]) -> list[Factors] | None:
        """Return the task vectors of some tasks as products, where all of them are known as such."""
        known = []
        for task in tasks:
            if (found := self.tasks[task].factors(self.name, self.base)) is None:
                return None
            known.append(found)
        return known

    def _task_vectors(self, chunk: RawChunk) -> np.ndarray:
        def room() -> np.ndarray:
            memory = (self.memory or ChunkMemory()).vectors
            return memory.rows(np.dtype(np.float32), chunk.num_elements, [0] * self.num_tasks)

        return self.backend.task_vectors(chunk, room)

    def last_pass(self, multiple_of: int = 1) -> Iterator[RawChunk]:
        """Yield the chunks as stored, each but the last one of a multiple of so many elements."""
        return self._stored(alone(self._chunks(multiple_of)), is_unread=True, is_last=True)

    def _chunks(self, multiple_of: int = 1) -> Iterator[tuple[int, int]]:
        length = in_multiples(self.chunk_elements, multiple_of)
        return in_runs(self.num_elements, length, length)

    def _stored(
        self,
        groups: Iterable[Sequence[tuple[int, int]]],
        *,
        is_unread: bool = False,
        is_last: bool = False,
    ) -> Iterator[RawChunk]:
        """Read groups of parts, or leave that to compiled loops; the last pass releases them."""
        read = partial(self._read, is_unread=is_unread, is_last=is_last)
        with self._files.opened() if self._files is not None else nullcontext():
            if self.reader is None:
                yield from map(read, groups)
            else:
                yield from ahead(self.reader, (partial(read, group) for group in groups), clock=self.clock)

    def release(self, stop: int) -> None:
        """Note that nothing before the element `stop` is going to be read again."""
        for source in self._sources:
            source.release(self.name, stop)

    @property
    def _sources(self) -> tuple[TensorSource, ...]:
        return (self.base, *self.tasks)

    @cached_property
    def _files(self) -> FileRows | None:
        if not self.backend.reads_files:
            return None
        own = self.memory.stored if self.memory else None
        memory = self.shared.memory if self.shared else own
        return FileRows.find(self._sources, self.name, self.clock, memory)

    def _read(self, parts: Sequence[tuple[int, int]], *, is_unread: bool, is_last: bool) -> RawChunk:
        # What compiled passes read themselves is read by the thread that merges, in its own memory.
        files = self._files if is_unread and self.reader is None and self.shared is None else None
        chunk = RawChunk(parts, partial(self._values, parts), files)
        chunk.checked_by = self.check
        if files is None:
            chunk.stored  # noqa: B018, read now, by this thread
        if is_last:  # by this thread, too: what is far away is read and released by one
            self.release(parts[-1][1])
        return chunk

    @property
    def key(self) -> Hashable:
        """What merges for several sites know the tensor by: files and places, or the sources themselves."""
        return (self.name, *self._sources) if self._files is None else self._files.places

    def is_turn_over(self, stop: int) -> bool:
        """Say whether another site goes on once this one has merged what is before `stop`: not at the end."""
        return self.shared is not None and stop < self.num_elements

    def _values(self, parts: Sequence[tuple[int, int]]) -> Stored | list[Stored]:
        read = self._read_one_by_one if self._files is None else self._files.read
        whole = [(0, self.num_elements)]
        with self.clock.spend("read"):
            if self.shared is None:
                return read(parts)
            if self.num_elements > self.chunk_elements:
                return self.shared.values((*parts, self.key), partial(read, parts))
            found = self.shared.values(self.key, partial(read, whole))
            return found if [*parts] == whole else picked(found, parts)

    def _read_one_by_one(self, parts: Sequence[tuple[int, int]]) -> Stored | list[Stored]:
        """Read one part of each checkpoint, into rows of one array where all have the same dtype."""
        (start, stop), *others = parts
        assert not others, "parts are read together by compiled loops only"
        infos = [source.index.tensors[self.name] for source in self._sources]
        if len({info.dtype for info in infos}) > 1:
            return [source.read_stored(self.name, start, stop) for source in self._sources]
        return self._read_into_rows(start, stop, infos)

    def _read_into_rows(self, start: int, stop: int, infos: Sequence[TensorInfo]) -> Stored | list[Stored]:
        """Read a part of all checkpoints; a source may return values that it holds already instead."""
        dtype = bits_dtype(infos[0].dtype)
        places = [info.start_byte + start * dtype.itemsize for info in infos]
        memory = self.shared.memory if self.shared else (self.memory or ChunkMemory()).stored
        rows = memory.rows(dtype, stop - start, places)
        wanted = [*rows]
        pairs = zip(self._sources, wanted, strict=True)
        found = [source.read_stored(self.name, start, stop, row) for source, row in pairs]
        is_in_rows = all(values.bits is row for values, row in zip(found, wanted, strict=True))
        return Stored(rows, infos[0].dtype) if is_in_rows else found

    def check(self, probe: float, chunk: RawChunk, merged: Stored | None = None) -> None:
        """Raise for the first value that is not finite, of the inputs or of what they were merged into.

        Finite task vectors mean finite inputs, and a finite sum of them (`probe`) means finite
        task vectors: one fast pass, where isfinite takes ten times as long. A sum may also
        overflow; only a close look tells.
        """
        if math.isfinite(probe):
            return
        if self._files is not None:
            self._files.verify()
        for source, values in zip(self._sources, chunk.values, strict=True):
            bad = torch.nonzero(~torch.isfinite(values))
            if len(bad):
                element = chunk.element(int(bad[0]))
                raise NonFiniteError(
                    f"element {element:,} is {float(values[bad[0]])}",
                    where=tensor_place(source, source.index.tensors[self.name], element),
                    expected="finite numbers only",
                    hint="The checkpoint is damaged or its training diverged; use an earlier one. If it is "
                    f"meant, copy it: tensors: [{rule_text(self.name)}]",
                )
        if not torch.isfinite(task_vectors(chunk.base, chunk.checkpoints)).all():
            raise NonFiniteError(
                "the checkpoints differ by more than float32 can hold",
                where=f"tensor {self.name!r}, elements from {chunk.start:,}",
            )
        if merged is not None and not merged.is_finite():
            values = merged.tensor
            first = int(torch.nonzero(~torch.isfinite(values))[0])
            raise NonFiniteError(
                f"merged element {chunk.start + first:,} is {float(values[first])}, from finite checkpoints",
                where=f"tensor {self.name!r}",
                expected=f"numbers that {str(values.dtype).removeprefix('torch.')} can hold",
                hint="Lower method.scaling, choose a wider output.dtype, or look at the method.",
            )


@dataclass(frozen=True)
class JoinedChunks:
    """The task vectors of several tensors, one after the other, as if they were one tensor's.

    Attributes:
        tensors: None without elements.
        expect: Called before every reading: tells sources that all tensors are read once, in order; with True
            where they are read in part.
        num_threads: Among which tensors are shared out, where rules let them be.
        looked_at: Called with the name of each tensor that was read to its end.
    """

    tensors: tuple[StoredChunks, ...]
    expect: Callable[[bool], None]
    num_threads: int = 1
    looked_at: Callable[[str], None] = lambda name: None
    has_base = True

    @property
    def num_tasks(self) -> int:
        return self.tensors[0].num_tasks

    @cached_property
    def num_elements(self) -> int:
        return sum(tensor.num_elements for tensor in self.tensors)

    @property
    def backend(self) -> Backend:
        return self.tensors[0].backend

    @property
    def scratch(self) -> Scratch:
        return self.tensors[0].scratch

    def __iter__(self) -> Iterator[tuple[int, Float32[torch.Tensor, "tasks chunk"]]]:
        for start, vectors in self.arrays():
            yield start, torch.from_numpy(vectors)

    def arrays(self) -> Iterator[tuple[int, Float32[np.ndarray, "tasks chunk"]]]:
        for first, tensor in self._one_by_one(in_part=False):
            for start, vectors in tensor.arrays():
                yield first + start, vectors
            self.looked_at(tensor.name)

    def recall(self, question: Hashable, find: Callable[[], T]) -> T:
        if (shared := self.tensors[0].shared) is None:
            return find()
        return shared.recall(tuple(tensor.key for tensor in self.tensors), question, find)

    def factors(self, tasks: Sequence[int]) -> None:
        return None

    def map(
        self,
        work: Callable[[Iterator[tuple[int, RawChunk]]], T],
        *,
        is_early: bool = False,
        multiple_of: int = 1,
    ) -> Iterator[T]:
        todo = self._placed()
        lock, errors, clock = Lock(), list[tuple[int, Exception]](), self.tensors[0].clock
        self.expect(False)

        def take() -> tuple[int, StoredChunks] | None:
            with lock:
                return None if errors or clock.is_stopped else next(todo, None)

        def in_one_thread() -> T:
            first = 0

            def share() -> Iterator[tuple[int, RawChunk]]:
                nonlocal first
                while (taken := take()) is not None:
                    first, tensor = taken
                    for start, chunk in tensor.stored(multiple_of=multiple_of):
                        yield first + start, chunk
                    tensor.release(tensor.num_elements)
                    self.looked_at(tensor.name)

            with clock.spend("compute"), inference():
                try:
                    return work(share())
                except Exception as error:
                    errors.append((first, error))
                    raise

        with ThreadPoolExecutor(self.num_threads) as pool, clock.spend("wait"), clock.stopping():
            done = [pool.submit(in_one_thread) for _ in range(self.num_threads)]
            wait(done)
        if errors:  # all before the first in order were taken before it, so it is always the same one
            raise min(errors, key=lambda error: error[0])[1]
        yield from (one.result() for one in done)

    def _placed(self) -> Iterator[tuple[int, StoredChunks]]:
        """Yield the tensors with the indices of their first elements."""
        firsts = accumulate((tensor.num_elements for tensor in self.tensors), initial=0)
        return zip(firsts, self.tensors, strict=False)

    def _one_by_one(self, *, in_part: bool) -> Iterator[tuple[int, StoredChunks]]:
        """Yield the tensors with the indices of their first elements, each to be read once."""
        self.expect(in_part)
        for first, tensor in self._placed():
            yield first, tensor
            tensor.release(tensor.num_elements)

    def runs(self, length: int, every: int) -> Float32[np.ndarray, "tasks in_runs"]:
        found = []
        for first, tensor in self._one_by_one(in_part=every >= _FAR_APART):
            begun = first // every * every - first  # a run may reach from tensor to tensor
            parts = (
                (max(start, 0), min(start + length, tensor.num_elements))
                for start in range(begun, tensor.num_elements, every)
                if start + length > 0
            )
            found.append(tensor.parts(parts))
        return np.concatenate(found, axis=1)
