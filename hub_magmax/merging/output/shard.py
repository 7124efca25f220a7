"""One safetensors file in the making: its header, and its bytes, hashed while they are written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from xxhash import xxh3_128, xxh3_128_digest

from hub_magmax.errors import OutputError
from hub_magmax.files import read_fully
from hub_magmax.planning.plan import Plan, Shard


def metadata_of(plan: Plan) -> dict[str, str]:
    """Provenance stored in every shard, beside what its source has there: the same on any machine."""
    sources = {name: source.label for name, source in plan.lock.every_source.items()}
    merge: dict[str, Any] = {
        "sources": sources,
        "method": dict(plan.lock.method),
        "preference": dict(plan.lock.preference.weights),
        "seed": plan.lock.seed,
        "lock": plan.lock.digest,
    }
    if rules := plan.lock.value_rules:
        merge["tensors"] = [*rules]
    return {"format": "pt", **plan.metadata, "hub_magmax": json.dumps(merge, ensure_ascii=False)}


def shard_header(plan: Plan, shard: Shard) -> bytes:
    """Return the safetensors header of an output file, known before any tensor is.

    It is padded so that the data begin at a multiple of 64 bytes, as memory does: between places that
    differ by a few bytes some processors copy at a fifth of the speed, see `source.RowMemory`.
    """
    entries: dict[str, Any] = {"__metadata__": metadata_of(plan)}
    position = 0
    for job in shard.jobs:
        offsets = [position, position + job.num_bytes]
        entries[job.name] = {"dtype": job.dtype, "shape": list(job.shape), "data_offsets": offsets}
        position += job.num_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text


#: Read at a time: it stays in the nearest caches, and its memory is used again.
READ_BYTES = 1 << 20

#: Hashed at a time of a file that is not finished.
HASHED_BYTES = 1 << 24

#: Processor time for writing to the page cache. A fifth of this is usual; new pages take twice as much on
#: virtual machines whose hypervisor reclaims free memory.
_SLOW_SECONDS_PER_BYTE = 1e-9


class ShardFile:
    """A file that is written once, in pieces of any order and by any thread, and read back.

    Pieces are remembered by a 128-bit hash that costs a thirtieth of a sha256, so that the file's sha256 is
    taken once, of what is read back.

    Pages that were read back and stored are dropped from the page cache where new memory is slow: pages for
    2 GB cost 4.9 s of processor time on a virtual machine, measured, and .4 s where pages were reused.
    """

    def __init__(self, path: Path, *, read_bytes: int = READ_BYTES, hashed_bytes: int = HASHED_BYTES) -> None:
        self._hashed_bytes = hashed_bytes
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = self._temporary.open("w+b", buffering=0)
        self._pieces: dict[int, tuple[int, bytes]] = {}
        self._lock = Lock()
        self._sha256, self._position = hashlib.sha256(), 0
        self._new_memory_is_slow = False  # found out by writing
        self._buffer = memoryview(bytearray(read_bytes))

    @property
    def size_bytes(self) -> int:
        """Bytes written."""
        return sum(length for length, _ in self._pieces.values())

    def write(self, content: bytes | memoryview, start: int) -> None:
        """Write `content` at the byte `start`. Pieces may not overlap, and in the end leave no hole.

        A piece may be written again, whole.
        """
        rest = memoryview(content)
        with self._lock:
            self._pieces[start] = len(rest), xxh3_128_digest(rest)
        size, before = len(rest), time.thread_time()
        while rest:
            done = os.pwrite(self._file.fileno(), rest, start)
            rest, start = rest[done:], start + done
        seconds = time.thread_time() - before
        if size >= len(self._buffer) and seconds > _SLOW_SECONDS_PER_BYTE * size:
            self._new_memory_is_slow = True

    def read_again(self, start: int) -> bytearray:
        """Return the piece that was written at the byte `start`, in memory of its own.

        Raises:
            OutputError: If it is not what was written.
        """
        with self._lock:
            length, expected = self._pieces[start]
        content = bytearray(length)
        read_fully(self._file.fileno(), start, memoryview(content))
        self._check(start, length, xxh3_128_digest(content), expected)
        return content

    def finish(self) -> str:
        """Put the file in its place, durably, and return its sha256.

        Raises:
            OutputError: If what can be read back is not what was written.
        """
        with self._file, ThreadPoolExecutor(1) as disk:  # which works while the rest is hashed
            stored = disk.submit(os.fsync, self._file.fileno())
            self._hash(self.size_bytes)
            stored.result()
            self._drop_pages()
        self._buffer = memoryview(b"")  # many files can be finished before the last of them is let go
        self._temporary.rename(self._path)
        return self._sha256.hexdigest()

    def read_back(self, stop: int) -> None:
        """Hash the bytes before `stop`, the end of a piece, once they are many; all of them are final.

        Raises:
            OutputError: If it is not what was written.
        """
        if stop - self._position >= self._hashed_bytes:
            self._hash(stop)
            self._drop_pages()

    def _hash(self, stop: int) -> None:
        with self._lock:
            pieces = sorted(piece for piece in self._pieces.items() if self._position <= piece[0] < stop)
        for start, (length, expected) in pieces:
            assert start == self._position, "pieces leave no hole"
            piece = xxh3_128()
            while self._position < start + length:
                part = self._buffer[: start + length - self._position]
                found = part[: read_fully(self._file.fileno(), self._position, part)]
                piece.update(found)
                self._sha256.update(found)
                self._position += len(part)
            self._check(start, length, piece.digest(), expected)

    def _drop_pages(self) -> None:
        """Drop hashed pages from the page cache, so that it reuses their memory, where new memory is slow."""
        if self._new_memory_is_slow and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # it is only advice
                os.posix_fadvise(self._file.fileno(), 0, self._position, os.POSIX_FADV_DONTNEED)

    def _check(self, start: int, length: int, found: bytes, expected: bytes) -> None:
        if found != expected:
            raise OutputError(
                f"bytes {start:,} to {start + length:,} are not what was written when read back",
                where=str(self._path),
                hint="The disk or the memory of this machine loses data; use another one.",
            )

    def abandon(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)
