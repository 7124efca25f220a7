"""Read-ahead of remote files: ranges fetched in the order of reading, a few of them in advance."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from hub_magmax.errors import DamagedError

#: Least and largest bytes of one request: many connections are slow to start, few are slow to fill.
SEGMENT_BYTES = (2**20, 8 * 2**20)

#: Requests of one source at a time.
_MAX_REQUESTS = 32


@dataclass(frozen=True)
class Segment:
    """The bytes `[start, stop)` of a file."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class Wanted:
    """Expected hash of a file, and the hash of its header to continue from.

    Attributes:
        sha256: Of the whole file, as the Hub states it.
        head: Of the bytes before `start`.
        start, stop: Bytes at which the tensors begin and end.
    """

    sha256: str
    head: hashlib._Hash
    start: int
    stop: int


Fetch = Callable[[str, int, memoryview], None]


def segments(ranges: Iterable[Segment], segment_bytes: int) -> tuple[Segment, ...]:
    """Join ranges that follow each other in a file, and cut the result into pieces of one request."""
    joined: list[Segment] = []
    for part in ranges:
        if joined and (joined[-1].path, joined[-1].stop) == (part.path, part.start):
            joined[-1] = Segment(part.path, joined[-1].start, part.stop)
        elif part.stop > part.start:
            joined.append(part)
    return tuple(
        Segment(whole.path, start, min(start + segment_bytes, whole.stop))
        for whole in joined
        for start in range(whole.start, whole.stop, segment_bytes)
    )


class ReadAhead:
    """Ranges that are going to be read, in order; each is fetched once, and one that occurs twice, twice.

    Bytes are kept until `release`. Files that are read from their first tensor to their end are hashed on
    the way.

    Args:
        ranges: In the order of reading, each from front to back.
        fetch: Fills a buffer with the bytes of a file from an offset on; called by several threads.
        wanted: Expected hashes by file; compared for files that are read whole and in order.
        budget_bytes: Limit of bytes held ahead of the reader; two requests are held at least.
        label: Name of the checkpoint in messages.
        limits: Least and largest bytes of one request.

    Attributes:
        ranges: As given.
    """

    def __init__(
        self,
        ranges: Iterable[Segment],
        fetch: Fetch,
        wanted: Mapping[str, Wanted],
        budget_bytes: int,
        label: str,
        limits: tuple[int, int] = SEGMENT_BYTES,
    ) -> None:
        self.ranges = tuple(ranges)
        smallest, largest = limits
        segment_bytes = min(max(budget_bytes // 8, smallest), largest)
        self._segments = segments(self.ranges, segment_bytes)
        self._longest = max((part.stop - part.start for part in self._segments), default=0)
        self._ahead = max(2, min(budget_bytes // segment_bytes, _MAX_REQUESTS))
        self._fetch, self._label = fetch, label
        self._pool = ThreadPoolExecutor(self._ahead)
        self._held: dict[int, Future[bytearray]] = {}
        self._first = self._next = 0  # held or being fetched: [first, next)
        self._checks = {
            path: _Check(path, want) for path, want in wanted.items() if _covers(self._segments, path, want)
        }
        self._places: dict[str, list[tuple[int, int]]] = {}
        for index, segment in enumerate(self._segments):
            self._places.setdefault(segment.path, []).append((segment.start, index))
        for places in self._places.values():
            places.sort()
        self._top_up(0)

    @property
    def is_whole(self) -> bool:
        """Whether every range is held or still to come."""
        return self._first == 0 and len(self._held) == self._next

    def read_into(self, path: str, start: int, buffer: memoryview) -> bool:
        """Fill `buffer`, or return False if the bytes are not in the ranges, or were released."""
        done = 0
        while done < len(buffer):
            index = self._find(path, start + done)
            if index is None:
                return False
            offset = start + done - self._segments[index].start
            content = memoryview(self._content(index))[offset:][: len(buffer) - done]
            buffer[done : done + len(content)] = content
            done += len(content)
        return True

    def _find(self, path: str, position: int) -> int | None:
        """Return the first segment that holds a byte, of those that are held or still to come."""
        places = self._places.get(path, [])
        stop = bisect_right(places, (position, len(self._segments)))
        start = bisect_right(places, (position - self._longest, len(self._segments)))
        found = (
            index
            for _, index in places[start:stop]
            if index >= self._first and position < self._segments[index].stop
        )
        return min(found, default=None)

    def _content(self, index: int) -> bytearray:
        if index >= self._next:
            self._next = max(self._next, index)  # what lies between is not read, so not fetched
        self._top_up(index)
        return self._held[index].result()

    def _top_up(self, index: int) -> None:
        """Request the segments from `index` on, as far ahead as the budget allows."""
        last = min(index + self._ahead, len(self._segments))
        while self._next < last:
            self._held[self._next] = self._pool.submit(self._load, self._segments[self._next])
            self._next += 1

    def _load(self, segment: Segment) -> bytearray:
        content = bytearray(segment.stop - segment.start)
        self._fetch(segment.path, segment.start, memoryview(content))
        return content

    def reach(self, path: str, position: int) -> None:
        """Free everything before the request that brings byte `position` of a file.

        Raises:
            DamagedError: If that completes a file, and its hash is another one.
        """
        if (index := self._find(path, position)) is not None:
            self._free_until(index)

    def release(self, path: str, position: int) -> None:
        """Free everything up to the byte before `position` of a file, in the order of reading.

        Raises:
            DamagedError: If that completes a file, and its hash is another one.
        """
        if (index := self._find(path, position - 1)) is not None:
            self._free_until(index + (self._segments[index].stop == position))

    def _free_until(self, stop: int) -> None:
        while self._first < stop:
            self._free(self._first)
            self._first += 1

    def _free(self, index: int) -> None:
        future, segment = self._held.pop(index, None), self._segments[index]
        check = self._checks.get(segment.path)
        if check is not None:
            check.add(segment, future.result() if future else None, self._label)

    def close(self) -> None:
        """Free everything; requests in flight are waited for."""
        self._pool.shutdown(cancel_futures=True)
        self._held.clear()


def _covers(parts: tuple[Segment, ...], path: str, want: Wanted) -> bool:
    """Say whether the segments of a file are all of it after its header, in order."""
    position = want.start
    for part in (part for part in parts if part.path == path):
        if part.start != position:
            return False
        position = part.stop
    return position == want.stop


class _Check:
    """Hash of the part of one file that was read."""

    def __init__(self, path: str, want: Wanted) -> None:
        self._path, self._want, self._hash = path, want, want.head.copy()
        self._position: int | None = want.start

    def add(self, segment: Segment, content: bytearray | None, label: str) -> None:
        """Hash the next bytes. A file whose bytes come in another order is not checked."""
        if content is None or segment.start != self._position:
            self._position = None
            return
        self._hash.update(content)
        self._position = segment.stop
        if segment.stop == self._want.stop and (found := self._hash.hexdigest()) != self._want.sha256:
            raise DamagedError(
                f"sha256 of what was received is {found}, the Hub states {self._want.sha256}",
                where=f"{label}, {self._path}",
                hint="Something on the way changed the bytes, and nothing of this merge is kept. Run the "
                "same command again; if it stays, `hf download` the model, and check it there.",
            )
