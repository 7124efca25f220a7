"""Profile and progress of a merge: seconds by kind of work, added up over threads, and bytes done."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, local

#: Takes the bytes that were done since it was last called.
Progress = Callable[[int], None]


class Clock:
    """Measures what threads are doing. Work inside other work counts for itself alone."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = Lock()
        self._thread = _Thread()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds so far by kind, in the order of their names; of work that is still going on, none."""
        with self._lock:
            return dict(sorted(self._seconds.items()))

    @contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Count what is done inside as `kind`."""
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
