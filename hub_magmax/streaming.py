"""One tensor of all checkpoints, read in chunks and a few of them ahead."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from hub_magmax import fusing, kernels
from hub_magmax.clock import Clock
from hub_magmax.errors import MismatchError, NonFiniteError
from hub_magmax.io.source import RowMemory, TensorSource, tensor_place, torch_dtype
from hub_magmax.planning import EXACT_REASON, TensorJob
from hub_magmax.scratch import IN_MEMORY, Scratch
from hub_magmax.selection import Bits

T = TypeVar("T")


@dataclass(frozen=True)
class StoredChunk:
    """Some elements of one tensor of all checkpoints, as stored.

    Attributes:
        start: Index of the first element.
        base, checkpoints: Values, all of the same length.
        rows: The same values as one tensor, the base model's first, where all have one dtype.
    """

    start: int
    base: Tensor
    checkpoints: list[Tensor]
    rows: Tensor | None = None


@dataclass(frozen=True)
class ChunkMemory:
    """Memory for one chunk after the other, as stored and as task vectors; one thread's."""

    stored: RowMemory = field(default_factory=RowMemory)
    vectors: RowMemory = field(default_factory=RowMemory)


@dataclass(frozen=True)
class StoredChunks:
    """One tensor's task vectors, read from the sources again at every iteration.

    Iterating may be repeated. `last_pass` is the last look at the tensor: what it passed is let go of.

    Attributes:
        reader: Runs the reads, one at a time and a few ahead of what is asked for; None reads when asked.
        is_compiled: Whether rules and passes use compiled loops.
        clock: Told when values are read and when they are waited for.
        memory: Holds the chunk that was read last, where no chunk is needed once the next one is read.

    Raises:
        NonFiniteError: While iterating, at the first NaN or infinity, with its place.
    """

    name: str
    num_elements: int
    base: TensorSource
    tasks: tuple[TensorSource, ...]
    chunk_elements: int
    reader: Executor | None
    is_compiled: bool = False
    memory: ChunkMemory | None = None
    clock: Clock = field(default_factory=Clock)
    scratch: Scratch = IN_MEMORY

    @property
    def num_tasks(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[tuple[int, Float[Tensor, "tasks chunk"]]]:
        return self.vectors(self._chunks())

    def runs(self, length: int, every: int) -> Iterator[tuple[int, Float[Tensor, "tasks run"]]]:
        return self.vectors(_runs(self.num_elements, length, every))

    def vectors(self, parts: Iterable[tuple[int, int]]) -> Iterator[tuple[int, Float[Tensor, "tasks part"]]]:
        """Yield parts, each from one element to before another, as task vectors."""
        for chunk in self._stored(self._read, parts):
            found, probe = self._task_vectors(chunk)
            self.check(probe, chunk.start, chunk.base, chunk.checkpoints)
            yield chunk.start, found

    def bits(self) -> Iterator[tuple[int, Bits]]:
        for chunk in self._stored(self._read, self._chunks()):
            yield chunk.start, self._bits(chunk)

    def _bits(self, chunk: StoredChunk) -> Bits:
        def check(largest: float) -> None:
            self.check(largest, chunk.start, chunk.base, chunk.checkpoints)

        if fusing.is_narrow(chunk):
            return fusing.bits(chunk, check)
        stacked = kernels.task_vectors(chunk.base, chunk.checkpoints)
        check(float(stacked.sum()))
        return Bits.of_vectors(stacked)

    def _task_vectors(self, chunk: StoredChunk) -> tuple[Tensor, float]:
        if self.is_compiled and fusing.is_narrow(chunk):
            memory = (self.memory or ChunkMemory()).vectors
            found = memory.rows(torch.float32, len(chunk.base), [0] * self.num_tasks)
            return found, fusing.task_vectors(chunk, found)
        stacked = kernels.task_vectors(chunk.base, chunk.checkpoints)
        return stacked, float(stacked.sum())

    def last_pass(self) -> Iterator[StoredChunk]:
        """Yield the chunks as stored."""
        return self._stored(self._read_last, self._chunks())

    def _chunks(self) -> Iterator[tuple[int, int]]:
        return _runs(self.num_elements, self.chunk_elements, self.chunk_elements)

    def _stored(
        self, read: Callable[[int, int], StoredChunk], parts: Iterable[tuple[int, int]]
    ) -> Iterator[StoredChunk]:
        if self.reader is None:
            return (read(*part) for part in parts)
        return ahead(self.reader, (partial(read, *part) for part in parts), clock=self.clock)

    def _read_last(self, start: int, stop: int) -> StoredChunk:
        found = self._read(start, stop)
        self.release(stop)
        return found

    def release(self, stop: int) -> None:
        """Note that nothing before the element `stop` is going to be read again."""
        for source in (self.base, *self.tasks):
            source.release(self.name, stop)

    def _read(self, start: int, stop: int) -> StoredChunk:
        with self.clock.spend("read"):
            return self._read_rows(start, stop)

    def _read_rows(self, start: int, stop: int) -> StoredChunk:
        sources = (self.base, *self.tasks)
        infos = [source.index.tensors[self.name] for source in sources]
        if len({info.dtype for info in infos}) > 1:
            base, *checkpoints = [source.read(self.name, start, stop) for source in sources]
            return StoredChunk(start, base, checkpoints)
        dtype = torch_dtype(infos[0].dtype)
        places = [info.start_byte + start * dtype.itemsize for info in infos]
        rows = (self.memory or ChunkMemory()).stored.rows(dtype, stop - start, places)
        wanted = [*rows]
        pairs = zip(sources, wanted, strict=True)
        found = [source.read(self.name, start, stop, row) for source, row in pairs]
        together = all(values is row for values, row in zip(found, wanted, strict=True))
        return StoredChunk(start, found[0], found[1:], rows if together else None)

    def check(
        self, probe: float, start: int, base: Tensor, checkpoints: list[Tensor], merged: Tensor | None = None
    ) -> None:
        """Raise for the first value that is not finite, of the inputs or of what they were merged into.

        Finite task vectors mean finite inputs, and a finite sum of them (`probe`) means finite
        task vectors: one fast pass, where isfinite takes ten times as long. A sum may also
        overflow; only a close look tells.
        """
        if math.isfinite(probe):
            return
        for source, values in zip((self.base, *self.tasks), (base, *checkpoints), strict=True):
            bad = torch.nonzero(~torch.isfinite(values))
            if len(bad):
                element = start + int(bad[0])
                raise NonFiniteError(
                    f"element {element:,} is {float(values[bad[0]])}",
                    where=tensor_place(source, source.index.tensors[self.name], element),
                    expected="finite numbers only",
                    hint="The checkpoint is damaged or its training diverged; use an earlier one. If it is "
                    f"meant, copy it: tensors: [{{match: {json.dumps(self.name)}, take: base_model}}]",
                )
        if not torch.isfinite(kernels.task_vectors(base, checkpoints)).all():
            raise NonFiniteError(
                "the checkpoints differ by more than float32 can hold",
                where=f"tensor {self.name!r}, elements from {start:,}",
            )
        if merged is not None and not torch.isfinite(merged).all():
            element = int(torch.nonzero(~torch.isfinite(merged))[0])
            raise NonFiniteError(
                f"merged element {start + element:,} is {float(merged[element])}, from finite checkpoints",
                where=f"tensor {self.name!r}",
                expected=f"numbers that {str(merged.dtype).removeprefix('torch.')} can hold",
                hint="Lower method.scaling, choose a wider output.dtype, or look at the method.",
            )


def _runs(size: int, length: int, every: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of the first `length` elements of every `every`, of so many in all."""
    return ((start, min(start + length, size)) for start in range(0, size, every))


@dataclass(frozen=True)
class JoinedChunks:
    """The task vectors of several tensors, one after the other, as if they were one tensor's.

    Attributes:
        tensors: None without elements.
        expect: Called before every reading: tells sources that all tensors are read once, in order.
    """

    tensors: tuple[StoredChunks, ...]
    expect: Callable[[], None]

    @property
    def num_tasks(self) -> int:
        return self.tensors[0].num_tasks

    @cached_property
    def num_elements(self) -> int:
        return sum(tensor.num_elements for tensor in self.tensors)

    @property
    def is_compiled(self) -> bool:
        return self.tensors[0].is_compiled

    @property
    def scratch(self) -> Scratch:
        return self.tensors[0].scratch

    def __iter__(self) -> Iterator[tuple[int, Float[Tensor, "tasks chunk"]]]:
        chunk_elements = self.tensors[0].chunk_elements
        return self.runs(chunk_elements, chunk_elements)

    def bits(self) -> Iterator[tuple[int, Bits]]:
        for first, tensor in self._one_by_one():
            for start, bits in tensor.bits():
                yield first + start, bits

    def _one_by_one(self) -> Iterator[tuple[int, StoredChunks]]:
        """Yield the tensors with the indices of their first elements, each to be read once."""
        self.expect()
        first = 0
        for tensor in self.tensors:
            yield first, tensor
            tensor.release(tensor.num_elements)
            first += tensor.num_elements

    def runs(self, length: int, every: int) -> Iterator[tuple[int, Float[Tensor, "tasks run"]]]:
        """Yield runs as `Chunks` says, one that reaches from tensor to tensor in pieces."""
        for first, tensor in self._one_by_one():
            begun = first // every * every - first
            parts = (
                (max(start, 0), min(start + length, tensor.num_elements))
                for start in range(begun, tensor.num_elements, every)
                if start + length > 0
            )
            for start, vectors in tensor.vectors(parts):
                yield first + start, vectors


def copied_chunks(
    job: TensorJob,
    sources: Mapping[str, TensorSource],
    tasks: tuple[str, ...],
    chunk_elements: int,
    clock: Clock | None = None,
) -> Iterator[Tensor]:
    """Yield the values of a tensor that is copied, in the output's dtype.

    A NaN or an infinity is copied like any other value.

    Raises:
        MismatchError: If values that cannot be merged differ between the checkpoints.
        NonFiniteError: If a finite value is too large for the output's dtype.
    """
    dtype, clock = torch_dtype(job.dtype), clock or Clock()
    for start in range(0, job.num_elements, chunk_elements):
        stop = min(start + chunk_elements, job.num_elements)
        with clock.spend("read"):
            values = sources[job.source].read(job.name, start, stop)
        sources[job.source].release(job.name, stop)
        if job.reason == EXACT_REASON:
            _check_equal(job, start, values, [sources[task] for task in tasks])
        yield values if values.dtype == dtype else _cast(job, sources[job.source], start, values, dtype)


def _cast(job: TensorJob, source: TensorSource, start: int, values: Tensor, dtype: torch.dtype) -> Tensor:
    cast = values.to(dtype)
    if not is_finite(cast):
        overflown = torch.nonzero(torch.isfinite(values) & ~torch.isfinite(cast))
        if len(overflown):
            element = int(overflown[0])
            raise NonFiniteError(
                f"element {start + element:,} is {float(values[element])}",
                where=tensor_place(source, source.index.tensors[job.name], start + element),
                expected=f"numbers that {str(dtype).removeprefix('torch.')} can hold",
                hint="Choose a wider output.dtype.",
            )
    return cast


def is_finite(values: Tensor) -> bool:
    """Say whether no value is a NaN or an infinity."""
    if not values.is_floating_point():
        return True
    if values.element_size() == 1:
        values = values.float()  # eight bits are for storage only
    # One fast pass, where isfinite takes ten times as long; float64 holds any sum of shorter numbers.
    total = float(values.sum(dtype=torch.float64))
    return math.isfinite(total) or bool(torch.isfinite(values).all())


def _check_equal(job: TensorJob, start: int, values: Tensor, others: Sequence[TensorSource]) -> None:
    for source in others:
        found = source.read(job.name, start, start + len(values))
        source.release(job.name, start + len(values))
        if not torch.equal(values, found):
            raise MismatchError(
                f"{job.dtype} values differ from the base model's",
                where=f"{source.label}, tensor {job.name!r}",
                expected="the same counts or positions everywhere, since they cannot be merged",
                hint=f"Say which to take: tensors: [{{match: {json.dumps(job.name)}, take: base_model}}]",
            )


def ahead(
    executor: Executor, calls: Iterable[Callable[[], T]], depth: int = 3, clock: Clock | None = None
) -> Iterator[T]:
    """Yield the results of `calls` in order, with up to `depth` of them running or waiting ahead."""
    clock = clock or Clock()
    pending: deque[Future[T]] = deque()

    def first() -> T:
        with clock.spend("wait"):
            return pending.popleft().result()

    for call in calls:
        pending.append(executor.submit(call))
        if len(pending) > depth:
            yield first()
    while pending:
        yield first()
