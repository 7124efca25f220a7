"""One chunk of a tensor: stored values of every checkpoint, and its task vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hub_magmax.checkpoints.source import RowMemory
from hub_magmax.checkpoints.stored import Stored
from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.merging.rows import FileRows


@dataclass
class StoredChunk:
    """Some elements of one tensor of all checkpoints, as stored; one thread's.

    Attributes:
        parts: Which elements: from one to before another, one part after the other.
        read: Returns a row of values per checkpoint, the base model's first; together if of one dtype.
        files: Where the values lie, if a pass may read them itself instead.
    """

    parts: Sequence[tuple[int, int]]
    read: Callable[[], Stored | list[Stored]]
    files: FileRows | None = None
    _stored: Stored | list[Stored] | None = None

    @property
    def start(self) -> int:
        return self.parts[0][0]

    @property
    def num_elements(self) -> int:
        return sum(stop - start for start, stop in self.parts)

    @property
    def stored(self) -> Stored | list[Stored]:
        """The rows, read when they are first asked for."""
        if self._stored is None:  # no cached_property: threads would wait for each other's reading
            self._stored = self.read()
        return self._stored

    @property
    def values(self) -> list[torch.Tensor]:
        """The rows as torch's."""
        return (
            [*self.stored.tensor] if isinstance(self.stored, Stored) else [row.tensor for row in self.stored]
        )

    @property
    def base(self) -> torch.Tensor:
        return self.values[0]

    @property
    def checkpoints(self) -> list[torch.Tensor]:
        return self.values[1:]

    def element(self, place: int) -> int:
        """Return the index in the tensor of what is at a place in the rows."""
        for start, stop in self.parts:
            if place < stop - start:
                return start + place
            place -= stop - start
        raise IndexError(place)


@dataclass(frozen=True)
class ChunkMemory:
    """Memory for one chunk after the other, as stored and as task vectors; every thread has its own."""

    stored: RowMemory = field(default_factory=RowMemory)
    vectors: RowMemory = field(default_factory=RowMemory)
