"""Tensors of a folder of safetensors files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from threading import Lock

from hub_magmax.checkpoints.index import TensorInfo
from hub_magmax.checkpoints.source import _Source
from hub_magmax.errors import CheckpointError, SourceError
from hub_magmax.recipe.references import is_folder, is_there

#: What the system is told at a time that it will be read: of more it heeds a part only, on many systems.
_ADVICE_BYTES = 2**21

#: Files that one source keeps open. Many sources of hundreds of shards would meet the system's limit.
_OPEN_FILES = 3

START_AGAIN = "Let what changes the file come to its end, then run the same command again."

#: Of a file, the byte it begins at, and its length.
_Piece = tuple[str, int, int]


class LocalSource(_Source):
    """A checkpoint folder on this machine.

    Every read is compared with how its file was when it was first opened (device, inode, size
    and time of the last change, whether later or earlier), so what is read belongs to one
    version of the file, the one whose header was checked.

    A link is followed only where it stays inside the folder, or leads from a snapshot of the Hub's
    cache to that cache's blobs: a repository can hold a link to any file of the reader's.

    Raises:
        SourceError: If the folder is not one, or a file is a link that leads out of it.
        CheckpointError: While reading, if a file was changed, replaced or cut since it was opened.
    """

    def __init__(self, folder: Path, label: str | None = None, weights: str = "") -> None:
        self.folder, self.label, self.weights = folder, label or str(folder), weights
        self._descriptors: dict[str, int] = {}
        self._versions: dict[str, tuple[int, ...]] = {}
        self._readers: Counter[str] = Counter()
        self._lock = Lock()  # threads share the descriptors, and none may close what another reads
        self._ahead: Iterator[_Piece] = iter(())
        self._ahead_bytes = self._least_ahead_bytes = 0
        self._released: Counter[str] = Counter()
        if not is_folder(folder):
            raise SourceError(
                "this is a file, not a folder" if is_there(folder) else "there is no such folder",
                where=self.label,
                expected="a checkpoint folder, as written by `save_pretrained`",
                hint="Check the path; relative paths start at the recipe's own folder.",
            )

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        try:
            files = sorted(path for path in self.folder.iterdir() if path.is_file())
            links = [path for path in files if path.is_symlink()]
            inside = self._link_targets() if links else ()
            sizes = {path.name: path.stat().st_size for path in files}
            stray = [p.name for p in links if not any(p.resolve().is_relative_to(top) for top in inside)]
        except OSError as error:
            raise SourceError(f"cannot be listed ({error.strerror})", where=self.label) from error
        if stray:
            raise SourceError(
                f"{stray[0]!r} is a link that leads out of the folder",
                where=self.label,
                expected="files, or links to files inside the folder",
                hint="If you trust the link, put the file itself in its place (`cp -L`).",
            )
        return sizes

    def _link_targets(self) -> tuple[Path, ...]:
        """Return the folders that a link may lead to."""
        folder = self.folder.resolve()
        for above in folder.parents:
            if above.name == "snapshots":  # the Hub's cache: snapshots/COMMIT/FILE -> blobs/HASH
                return folder, above.parent.joinpath("blobs").resolve()
        return (folder,)

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        with self.reading(path) as descriptor:
            done = read_fully(descriptor, start, buffer)
        if done < len(buffer):
            raise CheckpointError(
                f"ends at byte {start + done:,}; {start + len(buffer):,} were there when the header was read",
                where=f"{self.label}, {path}",
                hint=START_AGAIN,
            )

    def expect(self, names: Iterable[str], budget_bytes: int, *, in_part: bool = False) -> None:
        """Have the system fetch what is read next, while something else is computed, where it can be told."""
        if not hasattr(os, "posix_fadvise"):
            return
        infos = [] if in_part else [self.index.tensors[name] for name in names]
        with self._lock:
            self._ahead = _pieces(infos)
            self._ahead_bytes = budget_bytes
            # Advice for each chunk takes a tenth of the time of reading it.
            self._least_ahead_bytes = min(4 * _ADVICE_BYTES, budget_bytes // 2)
            self._released.clear()
        self._advise()

    def release(self, name: str, stop: int) -> None:
        info = self.index.tensors[name]
        with self._lock:
            done = stop * info.num_bytes // max(info.num_elements, 1)
            self._ahead_bytes += max(0, done - self._released[name])
            self._released[name] = max(done, self._released[name])
            is_much = self._ahead_bytes >= self._least_ahead_bytes
        if is_much:
            self._advise()

    def _advise(self) -> None:
        """Tell the system of as much more as there is room for. What is wrong shows when a file is read."""
        while (piece := self._next_piece()) is not None:
            path, start, length = piece
            with suppress(OSError), self._open(path) as descriptor:
                if not _is_cached(descriptor, start + length - 1):
                    os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)

    def _next_piece(self) -> _Piece | None:
        with self._lock:
            piece = next(self._ahead, None) if self._ahead_bytes > 0 else None
            self._ahead_bytes -= piece[2] if piece else 0
            return piece

    @contextmanager
    def reading(self, path: str) -> Iterator[int]:
        """Lend a file's descriptor. What was read meanwhile counts if this ends without an error."""
        where = f"{self.label}, {path}"
        try:
            with self._open(path) as descriptor:
                yield descriptor
                version = _version(descriptor)
        except OSError as error:
            raise SourceError(
                f"cannot be read ({error.strerror})",
                where=where,
                hint="Check the disk and the file's permissions, then run the same command again.",
            ) from error
        if version != self._versions[path]:
            raise CheckpointError(
                "the file was changed or replaced while it was being read", where=where, hint=START_AGAIN
            )

    def version(self, path: str) -> tuple[int, ...]:
        """Return what tells apart two versions of a file: device, inode, size, time of the last change."""
        with self._open(path) as descriptor:
            return _version(descriptor)

    @contextmanager
    def _open(self, path: str) -> Iterator[int]:
        """Lend a file's descriptor, which stays open meanwhile; the reading itself needs no lock."""
        with self._lock:
            self._readers[path] += 1
            if path not in self._descriptors:
                idle = [other for other in self._descriptors if not self._readers[other]]
                for other in idle[: max(0, len(self._descriptors) - _OPEN_FILES + 1)]:
                    os.close(self._descriptors.pop(other))
                self._descriptors[path] = os.open(self.folder / path, os.O_RDONLY | os.O_CLOEXEC)
                self._versions.setdefault(path, _version(self._descriptors[path]))
            descriptor = self._descriptors[path]
        try:
            yield descriptor
        finally:
            with self._lock:
                self._readers[path] -= 1

    def close(self) -> None:
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])


def _pieces(infos: Iterable[TensorInfo]) -> Iterator[_Piece]:
    for info in infos:
        stop = info.start_byte + info.num_bytes
        for start in range(info.start_byte, stop, _ADVICE_BYTES):
            yield info.file, start, min(_ADVICE_BYTES, stop - start)


def _is_cached(descriptor: int, place: int) -> bool:
    """Say whether a byte is known to be in the page cache, where advice would cost more than to ask."""
    if hasattr(os, "RWF_NOWAIT"):
        with suppress(OSError):
            return os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT) > 0
    return False


def read_fully(descriptor: int, start: int, buffer: memoryview) -> int:
    """Fill `buffer` from a file's byte `start` on; return the bytes read, fewer only at its end."""
    done = 0
    while done < len(buffer):  # one call moves at most 2 GiB
        count = os.preadv(descriptor, [buffer[done:]], start + done)
        if count == 0:
            break
        done += count
    return done


def _version(descriptor: int) -> tuple[int, ...]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
