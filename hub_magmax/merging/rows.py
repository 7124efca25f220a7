"""One tensor of several checkpoints on this machine, read by compiled loops.

Read by Python, a chunk of six checkpoints takes six calls into the system, each of which gives Python's lock
away and waits for it again; two threads that merged so spent a fifth of their time on it, measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NoReturn

import numpy as np

from hub_magmax.checkpoints.source import RowMemory, TensorFile, TensorSource
from hub_magmax.checkpoints.storage.local import START_AGAIN
from hub_magmax.errors import CheckpointError
from hub_magmax.kernels.compiled import cache
from hub_magmax.kernels.stored import Stored, bits_dtype
from hub_magmax.kernels.structures import Reading
from hub_magmax.merging.profile import Clock

#: Elements of each row that a loop reads before it works on them: six rows of bfloat16 stay in the second
#: cache. Half and twice as many took a tenth longer. A multiple of `loops.BLOCK`.
BLOCK_ELEMENTS = 2**16


class FileRows:
    """The place of one tensor in the files of several checkpoints: a row for each, as `Files` says.

    Attributes:
        dtype: Of all rows, as safetensors calls it.
        places: The path of each row's file, and its first byte there.
    """

    def __init__(
        self,
        sources: Sequence[TensorSource],
        files: Sequence[TensorFile],
        name: str,
        clock: Clock,
        memory: RowMemory | None,
    ) -> None:
        self.dtype = sources[0].index.tensors[name].dtype
        self._bits = bits_dtype(self.dtype)
        self._sources, self._files = sources, files
        self.places = tuple((file.path, file.start_byte) for file in files)
        self._places = np.array([file.start_byte for file in files], np.int64)
        self._name, self._clock, self._memory = name, clock, memory
        self._descriptors = np.empty(0, np.int32)

    @classmethod
    def find(
        cls, sources: Sequence[TensorSource], name: str, clock: Clock, memory: RowMemory | None
    ) -> FileRows | None:
        """Return the rows of a tensor, or None if they are not all in files here, or of several dtypes.

        Args:
            sources: Checkpoints that have the tensor.
            name: Of the tensor.
            clock: Told how long the reading takes.
            memory: For one chunk after the other, where none is needed once the next one is read.
        """
        files = [file for source in sources if (file := source.tensor_file(name)) is not None]
        dtypes = {source.index.tensors[name].dtype for source in sources}
        if len(files) < len(sources) or len(dtypes) > 1:
            return None
        return cls(sources, files, name, clock, memory)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the files open. Values read meanwhile count if this ends without an error.

        Raises:
            CheckpointError, SourceError: If a file cannot be read, or was changed.
        """
        with ExitStack() as stack:
            descriptors = [stack.enter_context(file.reading()) for file in self._files]
            self._descriptors = np.array(descriptors, np.int32)
            yield

    def read(self, parts: Sequence[tuple[int, int]]) -> Stored:
        """Return elements of all rows, from files that are open.

        Args:
            parts: From which element to before which.

        Raises:
            CheckpointError, SourceError: Where a file does not hold them all.
        """
        rows = self._rows(parts[0][0], sum(stop - start for start, stop in parts))
        bounds = np.array(parts, np.int64) * self._bits.itemsize
        offsets, lengths = np.ascontiguousarray(bounds[:, 0]), np.diff(bounds)[:, 0]
        with self._timed() as spent:
            where = self._descriptors, self._places, spent
            status = cache.read_rows(*where, offsets, lengths, rows.view(np.uint8))
        if status < 0:
            self._read_one_by_one(parts, rows)
        return Stored(rows, self.dtype)

    def _read_one_by_one(self, parts: Sequence[tuple[int, int]], rows: np.ndarray) -> None:
        """Read again through the sources, whose errors name the file and the reason."""
        for source, row in zip(self._sources, rows, strict=True):
            pieces = np.split(row, np.cumsum([stop - start for start, stop in parts])[:-1])
            for (start, stop), piece in zip(parts, pieces, strict=True):
                source.read_stored(self._name, start, stop, piece)

    def raise_for(self, parts: Sequence[tuple[int, int]]) -> NoReturn:
        """Raise for elements that a loop could not read, naming the file.

        Raises:
            CheckpointError, SourceError: Always.
        """
        self._read_one_by_one(parts, self._rows(parts[0][0], sum(stop - start for start, stop in parts)))
        raise CheckpointError(
            "could not be read before, and can be now", where=f"tensor {self._name!r}", hint=START_AGAIN
        )

    def verify(self) -> None:
        """Raise CheckpointError if a file was changed since it was opened."""
        for file in self._files:
            with file.reading():
                pass

    @contextmanager
    def reading(self, start: int) -> Iterator[Reading]:
        """Give the files to loops that read from the element `start` on; time that they take is noted."""
        memory = self._rows(start, BLOCK_ELEMENTS)
        with self._timed() as spent:
            offset = start * self._bits.itemsize
            yield Reading(self._descriptors, self._places, spent, offset, memory, memory.reshape(-1))

    @contextmanager
    def _timed(self) -> Iterator[np.ndarray]:
        """Give a clock as `Reading.spent`, and note the time that it counts."""
        spent = np.array([time.CLOCK_MONOTONIC, 0, 0, 0], np.int64)
        yield spent
        self._clock.count("read", int(spent[1]) / 1e9)

    def _rows(self, start: int, length: int) -> np.ndarray:
        places = [place + start * self._bits.itemsize for place in self._places.tolist()]
        return (self._memory or RowMemory()).rows(self._bits, length, places)
