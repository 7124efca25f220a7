"""Descriptors of a folder's files: few of them open, shared by threads, each of one version of its file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

#: Files that one folder keeps open. Many sources of hundreds of shards would exceed the system's limit.
_OPEN_FILES = 3


class Descriptors:
    """Descriptors of the files of a folder.

    A version of a file is its device, inode, size and time of the last change. The folder has one too.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, int] = {}
        self._versions: dict[str, tuple[int, ...]] = {}
        self._readers: Counter[str] = Counter()
        self._lock = Lock()  # threads share the descriptors, and none may close what another reads

    @contextmanager
    def lend(self, path: str) -> Iterator[int]:
        """Lend a file's descriptor, which stays open meanwhile; the reading itself needs no lock."""
        with self._lock:
            self._readers[path] += 1
            if path not in self._open:
                idle = [other for other in self._open if not self._readers[other]]
                for other in idle[: max(0, len(self._open) - _OPEN_FILES + 1)]:
                    os.close(self._open.pop(other))
                self._open[path] = os.open(self._folder / path, os.O_RDONLY | os.O_CLOEXEC)
                self._versions.setdefault(path, _version(os.fstat(self._open[path])))
            descriptor = self._open[path]
        try:
            yield descriptor
        finally:
            with self._lock:
                self._readers[path] -= 1

    @property
    def opened(self) -> dict[str, int]:
        """Descriptors that are open now, by path."""
        return dict(self._open)

    def is_unchanged(self, path: str, descriptor: int) -> bool:
        """Say whether a file that is lent still is the version that was opened first."""
        return _version(os.fstat(descriptor)) == self._versions[path]

    def current_version(self, path: str) -> tuple[int, ...]:
        """Return the version of the file that now has this name."""
        return _version((self._folder / path).stat())

    def are_current(self) -> bool:
        """Say whether every file that was opened still has its name and its version."""
        try:
            return all(self.current_version(path) == found for path, found in self._versions.items())
        except OSError:
            return False

    def close(self) -> None:
        """Close all; a file that is lent later is opened again."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])


def _version(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
