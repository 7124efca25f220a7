"""Checkpoints as sources of tensors: a folder, or memory.

A source answers two questions: which files it has, and which bytes lie in a range of one of
them. Everything else (headers, tensors) is built on that here, the same for all of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from threading import Lock, local
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hub_magmax.checkpoints.index import CheckpointIndex, TensorInfo, read_index
from hub_magmax.checkpoints.stored import Stored, bits_dtype
from hub_magmax.errors import CheckpointError, SourceError
from hub_magmax.recipe.references import is_folder, is_there

if TYPE_CHECKING:
    from torch import Tensor

#: What the system is told at a time that it will be read: of more it heeds a part only, on many systems.
_ADVICE_BYTES = 2**21

#: Files that one source keeps open. Many sources of hundreds of shards would meet the system's limit.
_OPEN_FILES = 3

START_AGAIN = "Let what changes the file come to its end, then run the same command again."


#: Of a file, the byte it begins at, and its length.
_Piece = tuple[str, int, int]


class TensorSource(Protocol):
    """A checkpoint whose tensors can be read in pieces.

    Attributes:
        label: What it is called in messages.
        sizes: Bytes of every file, by path relative to the checkpoint, sorted.
    """

    label: str

    @property
    def sizes(self) -> Mapping[str, int]: ...

    @property
    def index(self) -> CheckpointIndex: ...

    def read_bytes(self, path: str, start: int, stop: int) -> bytes:
        """Return the bytes `[start, stop)` of a file, all of them or an error."""
        ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the elements `[start, stop)` of a tensor, flat, in its stored dtype."""
        ...

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        """Return what `read` does, as a file has it.

        Args:
            name: Of the tensor.
            start, stop: First element, and the one after the last.
            out: What to fill with bits, without gaps, and return; a source whose values are not stored
                anywhere returns an array of its own all the same.
        """
        ...

    def expect(self, names: Iterable[str], budget_bytes: int, *, in_part: bool = False) -> None:
        """Note that these tensors are going to be read, in this order and each from front to back.

        A source that is far away fetches them ahead, holding about `budget_bytes`; one on this machine has
        the system do so. What was read of a tensor is kept until `release`, or until the next tensor is
        read, so that it can be read again.

        Args:
            names: Of the tensors.
            budget_bytes: How much may be held of what is not read yet.
            in_part: Only some elements of each are going to be read. Where these alone can be fetched,
                nothing is fetched ahead.
        """
        ...

    def release(self, name: str, stop: int) -> None:
        """Note that nothing before the element `stop` of a tensor is going to be read again."""
        ...

    def close(self) -> None: ...


#: Places in memory and in a file that are this near, seen from the start of a page, are slow to copy between.
_NEAR_BYTES = 64
_PAGE_BYTES = 4096


class RowMemory(local):
    """Memory for rows of values that are read from files, used again by every call; each thread has its own.

    Fresh memory for every chunk costs as much as reading into it: the system gives and takes it page by page.

    On processors of AMD the system copies five times as slowly where memory lies up to 31 bytes after the
    place in the file, both seen from the start of a page (2 GB/s instead of 8, measured; the C library has
    the same with `rep movsb`, its bug 30994). Headers of checkpoints are as long as they are, so this is met
    by accident, with all rows at once. Hence the rows begin where none of them is met by it.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def rows(self, dtype: np.dtype[Any], length: int, start_bytes: Sequence[int]) -> np.ndarray:
        """Return memory for values that lie at these places in their files: contiguous rows, not filled."""
        row_bytes = length * dtype.itemsize
        num_bytes = len(start_bytes) * row_bytes
        if len(self._memory) < num_bytes + _PAGE_BYTES:
            self._memory = np.empty(num_bytes + _PAGE_BYTES, np.uint8)
        first = self._memory.ctypes.data
        apart = [first + row * row_bytes - start for row, start in enumerate(start_bytes)]
        shifts = range(-first % _NEAR_BYTES, _PAGE_BYTES, _NEAR_BYTES)
        good = (s for s in shifts if not any(0 < (s + a) % _PAGE_BYTES < _NEAR_BYTES for a in apart))
        shift = next(good, shifts[0])
        return self._memory[shift : shift + num_bytes].view(dtype).reshape(len(start_bytes), length)


class _Source:
    """What all sources share: an index read once, and tensors as ranges of bytes."""

    label: str

    #: The file of weights, or the index, that counts where there are several.
    weights = ""

    @property
    def sizes(self) -> Mapping[str, int]:
        raise NotImplementedError

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a file from `start` on, or raise SourceError."""
        raise NotImplementedError

    @property
    def origin(self) -> str:
        """What `from_pretrained` takes to load the checkpoint, as Python writes it."""
        return repr(self.label)

    @cached_property
    def index(self) -> CheckpointIndex:
        return read_index(self.label, self.sizes, self.read_bytes, self.weights, self.origin)

    def read_bytes(self, path: str, start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        self.read_into(path, start, memoryview(buffer))
        return bytes(buffer)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.read_stored(name, start, stop).tensor

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        info = self.index.tensors[name]
        dtype = bits_dtype(info.dtype)
        start_byte = info.start_byte + start * dtype.itemsize
        bits = RowMemory().rows(dtype, stop - start, [start_byte])[0] if out is None else out
        assert bits.shape == (stop - start,) and bits.dtype == dtype
        if stop > start:
            # The array's own memory is the read buffer: no copy, no zeroing.
            self.read_into(info.file, start_byte, bits.view(np.uint8).data)
        return Stored(bits, info.dtype)

    # What lies in memory is there when it is wanted.

    def expect(self, names: Iterable[str], budget_bytes: int, *, in_part: bool = False) -> None:
        pass

    def release(self, name: str, stop: int) -> None:
        pass

    def close(self) -> None:
        pass


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


class MemorySource(_Source):
    """A checkpoint held in memory: files by name, or tensors, which are laid out as one file."""

    def __init__(self, files: Mapping[str, bytes], label: str = "memory", weights: str = "") -> None:
        self.files, self.label, self.weights = dict(files), label, weights

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], label: str = "memory") -> MemorySource:
        from safetensors.torch import save

        return cls({"model.safetensors": save(dict(tensors), metadata={"format": "pt"})}, label)

    @property
    def sizes(self) -> Mapping[str, int]:
        return {path: len(content) for path, content in sorted(self.files.items())}

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        content = self.files[path][start : start + len(buffer)]
        if len(content) != len(buffer):
            raise CheckpointError(f"ends at byte {len(self.files[path]):,}", where=f"{self.label}, {path}")
        buffer[:] = content


def tensor_place(source: TensorSource, info: TensorInfo, element: int) -> str:
    """Return where an element of a tensor lies, for a message."""
    item_bytes = info.num_bytes // max(info.num_elements, 1)
    return (
        f"{source.label}, {info.file}, tensor {info.name!r}, byte {info.start_byte + element * item_bytes:,}"
    )
