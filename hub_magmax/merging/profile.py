"""Profile and progress of a merge: seconds by kind of work, memory, and bytes done."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, Thread, local

#: Takes the bytes that were done since it was last called.
Progress = Callable[[int], None]

#: Seconds between two looks at the memory; a look takes some 20 microseconds.
_LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Spent:
    """Cost of a merge in one process.

    Attributes:
        seconds: By kind of work, added up over its threads.
        peak_memory_bytes: Most memory that the process had of its own, without files that it maps.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0


class StoppedError(BaseException):
    """A thread ends what it does, of which nobody takes the result any more."""


class Clock:
    """Measures what threads are doing. Work inside other work counts for itself alone."""

    def __init__(self) -> None:
        self.is_stopped = False
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = Lock()
        self._thread = _Thread()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds so far by kind, in the order of their names; of work that is still going on, none."""
        with self._lock:
            return dict(sorted(self._seconds.items()))

    def stop(self) -> None:
        """Let every thread end that goes on to something else, so that none finishes a tensor."""
        self.is_stopped = True

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Stop where an error or an interruption ends what is done inside."""
        try:
            yield
        except BaseException:
            self.stop()
            raise

    @contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Count what is done inside as `kind`.

        Raises:
            StoppedError: After `stop`.
        """
        if self.is_stopped:
            raise StoppedError
        self._note()
        self._thread.kinds.append(kind)
        try:
            yield
        finally:
            self._note()
            self._thread.kinds.pop()

    def count(self, kind: str, seconds: float) -> None:
        """Count so much of what this thread did last as `kind`, not as what it is doing."""
        with self._lock:
            self._seconds[kind] += seconds
            if self._thread.kinds:
                self._seconds[self._thread.kinds[-1]] -= seconds

    def _note(self) -> None:
        """Count the time since the last change for what this thread is doing."""
        now, thread = time.perf_counter(), self._thread
        if thread.kinds:
            with self._lock:
                self._seconds[thread.kinds[-1]] += now - thread.since
        thread.since = now


class _Thread(local):
    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.since = 0.0


class MemoryWatch:
    """Most memory that this process has of its own while the watch is open, without files that it maps.

    The system keeps no record of that, so it is looked at again and again; where it is not told at all, files
    count too.
    """

    def __init__(self) -> None:
        self._most = 0
        self._ended = Event()
        self._thread = Thread(target=self._look_on, daemon=True)

    @property
    def peak_bytes(self) -> int:
        """The most so far."""
        self._most = max(self._most, _own_bytes())
        return self._most

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look_on(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            self._most = max(self._most, _own_bytes())


def _own_bytes() -> int:
    with suppress(OSError, ValueError, IndexError):
        _, resident, of_files = Path("/proc/self/statm").read_text(encoding="ascii").split()[:3]
        return (int(resident) - int(of_files)) * os.sysconf("SC_PAGE_SIZE")
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the largest resident set this process had, files that it maps included."""
    with suppress(OSError, StopIteration):
        # Not from getrusage, which on Linux counts from before the program was started: the parent's.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
