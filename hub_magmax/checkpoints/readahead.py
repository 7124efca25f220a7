"""Ranges of files, fetched in the order in which they will be read, a few of them ahead."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from hub_magmax.errors import DamagedError

#: Bytes of one request: many connections are slow to start, few are slow to fill.
_SEGMENT_BYTES = (2**20, 8 * 2**20)

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
    """What a file should be: the hash of all its bytes, and that of its header so far.

    Attributes:
        sha256: Of the whole file, as the Hub states it.
        head: The hash of the bytes before `start`, to go on with.
        start, stop: Where the tensors begin and end.
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
    """The ranges that are going to be read, in order; each is fetched once.

    What was read is kept until `release` says that it is done with. Files that are read from their first
    tensor to their end are hashed on the way.

    Args:
        ranges: In the order in which they are read, each from front to back.
        fetch: Fills a buffer with the bytes of a file from some place on; called by several threads.
        wanted: By file, what its hash should be; only of files that are read whole and in order.
        budget_bytes: Held ahead of what is read, at most (two requests at least).
        label: What the checkpoint is called in messages.
    """

    def __init__(
        self,
        ranges: Iterable[Segment],
        fetch: Fetch,
        wanted: Mapping[str, Wanted],
        budget_bytes: int,
        label: str,
    ) -> None:
        smallest, largest = _SEGMENT_BYTES
        segment_bytes = min(max(budget_bytes // 8, smallest), largest)
        self._segments = segments(ranges, segment_bytes)
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

    def read_into(self, path: str, start: int, buffer: memoryview) -> bool:
        """Fill `buffer`, or return False where the bytes are not among those expected, or done with."""
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
        """Return the segment that holds a byte, if it is held or still to come."""
        places = self._places.get(path, [])
        at = bisect_right(places, (position, len(self._segments))) - 1
        if at < 0:
            return None
        index = places[at][1]
        inside = position < self._segments[index].stop
        return index if inside and index >= self._first else None

    def _content(self, index: int) -> bytearray:
        if index >= self._next:
            self._next = max(self._next, index)  # what lies between is not read, so not fetched
        self._top_up(index)
        return self._held[index].result()

    def _top_up(self, index: int) -> None:
        """Have everything on its way that belongs to what is read from segment `index` on."""
        last = min(index + self._ahead, len(self._segments))
        while self._next < last:
            self._held[self._next] = self._pool.submit(self._load, self._segments[self._next])
            self._next += 1

    def _load(self, segment: Segment) -> bytearray:
        content = bytearray(segment.stop - segment.start)
        self._fetch(segment.path, segment.start, memoryview(content))
        return content

    def reach(self, path: str, position: int) -> None:
        """Let go of all that is read before the request that brings byte `position` of a file.

        Raises:
            DamagedError: If that completes a file whose hash is not the one that it should be.
        """
        if (index := self._find(path, position)) is not None:
            self._let_go_until(index)

    def release(self, path: str, position: int) -> None:
        """Let go of all that is read up to the byte before `position` of a file, in the order of reading.

        Raises:
            DamagedError: If that completes a file whose hash is not the one that it should be.
        """
        if (index := self._find(path, position - 1)) is not None:
            self._let_go_until(index + (self._segments[index].stop == position))

    def _let_go_until(self, stop: int) -> None:
        while self._first < stop:
            self._let_go(self._first)
            self._first += 1

    def _let_go(self, index: int) -> None:
        future, segment = self._held.pop(index, None), self._segments[index]
        check = self._checks.get(segment.path)
        if check is not None:
            check.add(segment, future.result() if future else None, self._label)

    def close(self) -> None:
        """Forget everything; requests on their way are waited for."""
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
    """The hash of one file, as far as it was read."""

    def __init__(self, path: str, want: Wanted) -> None:
        self._path, self._want, self._hash = path, want, want.head.copy()
        self._position: int | None = want.start

    def add(self, segment: Segment, content: bytearray | None, label: str) -> None:
        """Go on with the next bytes; where they are not the next ones, the file goes unchecked."""
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
