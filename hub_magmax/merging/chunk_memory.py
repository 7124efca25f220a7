"""Memory for chunks of checkpoints, and the last chunk of a thread for merges of the same one."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from threading import local
from typing import Any, TypeVar

from hub_magmax.checkpoints.source import RowMemory

Found = TypeVar("Found")


@dataclass(frozen=True)
class ChunkMemory:
    """Memory for one chunk after the other, as stored and as task vectors; every thread has its own."""

    stored: RowMemory = field(default_factory=RowMemory)
    vectors: RowMemory = field(default_factory=RowMemory)


class SharedChunk(local):
    """The chunk that a thread read last, and what it found out about the tensor, for merges in turn.

    Attributes:
        memory: Holds the chunk.
    """

    def __init__(self) -> None:
        self.memory = RowMemory()
        self._chunk: Hashable = None
        self._stored: Any = None
        self._tensor: Hashable = None
        self._found: dict[Hashable, Any] = {}

    def values(self, chunk: Hashable, read: Callable[[], Found]) -> Found:
        """Return the values of a chunk, by `read` into `memory` unless it is the last one."""
        if self._stored is None or self._chunk != chunk:
            self._stored = None  # what it held is written over
            self._stored, self._chunk = read(), chunk
        found: Found = self._stored
        return found

    def recall(self, tensor: Hashable, question: Hashable, find: Callable[[], Found]) -> Found:
        """Return what `find` gave for a question about a tensor before, or gives now; of the last tensor."""
        if self._tensor != tensor:
            self._tensor, self._found = tensor, {}
        if question not in self._found:
            self._found[question] = find()
        found: Found = self._found[question]
        return found
