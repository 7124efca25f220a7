"""Write a checkpoint folder that is complete or absent.

Everything goes into `NAME.partial` beside the output; one rename makes it the output. Each
finished shard leaves a small record in the journal there, so that the same merge, started
again, goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock

from filelock import FileLock, Timeout
from xxhash import xxh3_128, xxh3_128_digest

from hub_magmax.checkpoints.local import read_fully
from hub_magmax.errors import OutputError
from hub_magmax.files import _sync, _write_durably, os_errors, sha256_of, write_text
from hub_magmax.merging.output.report import ShardRecord

#: Read at a time: it stays in the nearest caches, and its memory is used again.
_READ_BYTES = 1 << 20
#: Hashed at a time of a file that is not finished.
_HASHED_BYTES = 1 << 24

#: Of a processor, for writing to the system's cache: a fifth of this is usual, and twice as much is taken by
#: new memory of virtual machines whose hypervisor takes back what is free.
_SLOW_SECONDS_PER_BYTE = 1e-9


class ShardFile:
    """A file that is written once, in pieces of any order and by any thread, and read back.

    Pieces are remembered by a 128-bit hash that costs a thirtieth of a sha256, so that the file's sha256 is
    taken once, of what is read back.

    What was read back and stored is let go of where new memory is slow: for the cache to take some for 2 GB
    cost 4.9 s of a processor on a virtual machine, measured, and .4 s where it could use the same again.
    """

    #: Found out by writing; the same for all files, because it is the machine's.
    _new_memory_is_slow = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = self._temporary.open("w+b", buffering=0)
        self._pieces: dict[int, tuple[int, bytes]] = {}
        self._lock = Lock()
        self._sha256, self._position = hashlib.sha256(), 0
        self._buffer = memoryview(bytearray(_READ_BYTES))

    @property
    def size_bytes(self) -> int:
        """How many bytes were written."""
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
        if size >= _READ_BYTES and seconds > _SLOW_SECONDS_PER_BYTE * size:
            ShardFile._new_memory_is_slow = True

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
            self._let_go()
        self._temporary.rename(self._path)
        return self._sha256.hexdigest()

    def read_back(self, stop: int) -> None:
        """Hash what is before the byte `stop`, where a piece ends and all is written for good; not a little.

        Raises:
            OutputError: If it is not what was written.
        """
        if stop - self._position >= _HASHED_BYTES:
            self._hash(stop)
            self._let_go()

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

    def _let_go(self) -> None:
        """Have the system write what was hashed, and use its memory for what comes, where new is slow."""
        if ShardFile._new_memory_is_slow and hasattr(os, "posix_fadvise"):
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


class PartialFolder:
    """The place beside the output where one merge is being made.

    `NAME.partial/model` becomes the output; `NAME.partial/journal` holds what is finished, and
    `NAME.partial/survey` what was found out about the whole model before.

    Attributes:
        folder, survey_folder: The first and the last of these.
        num_open: While one file is read back the next is written.

    Args:
        output: Where the finished folder will be.
        plan_digest: Identifies the merge; finished shards of another one are thrown away.
    """

    num_open = 2

    def __init__(self, output: Path, plan_digest: str) -> None:
        if not output.name or not _can_be_made(output):
            raise OutputError(
                "this cannot be the path of a new folder" if output.name else "the output is the root folder",
                where=ascii(str(output)),
                expected="a new or empty folder",
                hint="Choose another output.path.",
            )
        self.output, self.plan_digest = output, plan_digest
        self._root = output.with_name(output.name + ".partial")
        self.folder, self._journal = self._root / "model", self._root / "journal"
        self.survey_folder = self._root / "survey"
        self._lock = FileLock(self._root / "lock", blocking=False)

    def prepare(self, sources: str = "") -> None:
        """Create the folder, or keep only the finished shards of this merge in it; one process does this.

        Args:
            sources: Stands for what the files are made from; those of other sources are made again.

        Raises:
            OutputError: If the output is taken, being written by another process, or cannot be.
        """
        self.clean_up()
        refuse_taken(self.output)
        with os_errors(self.output):
            self._root.mkdir(parents=True, exist_ok=True)
            try:
                if not self._acquire():
                    raise OutputError(
                        "another process is writing this output",
                        where=str(self.output),
                        hint="Wait for it to end, or choose another output.path.",
                    )
                refuse_taken(self.output)  # the other one may have ended a moment ago
                self._keep_finished_shards(f"{self.plan_digest}\n{sources}")
            except BaseException:  # memory can run out too
                self.abandon()
                with contextlib.suppress(OSError):
                    self._root.rmdir()  # where there was not even room for a lock
                raise

    def clean_up(self) -> None:
        """Remove what is left beside a finished output when its merge was killed after the rename."""
        with contextlib.suppress(OSError):
            if self.output.is_dir() and self._root.is_dir() and not self.folder.exists() and self._acquire():
                self._remove()

    def _acquire(self) -> bool:
        try:
            self._lock.acquire()
        except Timeout:
            return False
        return True

    def _keep_finished_shards(self, identity: str) -> None:
        """Remove all but this merge's finished shards: nothing else may come into the output."""
        if self._stored_identity() != identity:
            for folder in (self._journal, self.survey_folder):
                if folder.exists():
                    shutil.rmtree(folder)
        for folder in (self._journal, self.folder):
            folder.mkdir(exist_ok=True)
        self.sweep()
        _write_durably(self._journal / "plan", identity)

    def sweep(self) -> None:
        """Remove all files but finished shards."""
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif self.recorded(path.name) is None:
                path.unlink()

    def _stored_identity(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            return (self._journal / "plan").read_text(encoding="utf-8")
        return ""

    def record(self, record: ShardRecord) -> None:
        """Note durably that a shard is finished."""
        _write_durably(self._journal / f"{record.file}.json", json.dumps(asdict(record)))

    def recorded(self, file: str) -> ShardRecord | None:
        """Return what the journal says about a shard, or None if it is not finished."""
        try:
            values = json.loads((self._journal / f"{file}.json").read_text(encoding="utf-8"))
            record = ShardRecord(**values)
            return replace(
                record,
                counts=tuple(record.counts),
                num_unaligned=tuple(record.num_unaligned),
                not_finite=tuple(record.not_finite),
            )
        except (OSError, ValueError, TypeError):
            return None

    def intact(self, file: str) -> ShardRecord | None:
        """Return the record of a finished shard whose bytes still have the recorded sha256, else None."""
        record = self.recorded(file)
        with contextlib.suppress(OSError):
            if record and sha256_of(self.folder / file) == record.sha256:
                return record
        return None

    def forget(self, files: Iterable[str] | None = None) -> None:
        """Take these shards (None: any) for finished no more: the same merge makes them again."""
        if files is None:
            shutil.rmtree(self.survey_folder, ignore_errors=True)
            files = [path.name.removesuffix(".json") for path in self._journal.glob("*.json")]
        for file in files:
            for kind in ("sent", "json"):
                (self._journal / f"{file}.{kind}").unlink(missing_ok=True)

    def send(self, file: str, place: str) -> None:
        """Note durably that a finished shard is at `place` too, and remove it here."""
        _write_durably(self._journal / f"{file}.sent", place)
        (self.folder / file).unlink(missing_ok=True)

    def sent(self, file: str, place: str) -> ShardRecord | None:
        """Return the record of a finished shard that was sent to `place`, else None."""
        with contextlib.suppress(OSError, ValueError):
            if (self._journal / f"{file}.sent").read_text(encoding="utf-8") == place:
                (self.folder / file).unlink(missing_ok=True)  # left by a kill after the note
                return self.recorded(file)
        return None

    def mark(self, text: str) -> None:
        """Leave a mark by which other processes see that they share this folder."""
        write_text(self._root / "mark", text)

    def is_marked(self, text: str) -> bool:
        """Say whether this very mark was left here."""
        with contextlib.suppress(OSError, ValueError):
            return (self._root / "mark").read_text(encoding="utf-8") == text
        return False

    def remove(self) -> None:
        """Remove everything, since all of it is somewhere else now."""
        self._remove()

    def publish(self) -> None:
        """Turn the folder into the output by one rename, after which it survives a loss of power."""
        refuse_taken(self.output)
        with os_errors(self.output):
            for path in (*self.folder.iterdir(), self.folder):
                _sync(path)
            if self.output.exists():
                self.output.rmdir()  # empty, or refuse_taken had objected
            self.folder.rename(self.output)
            with contextlib.suppress(OSError):  # from here on the output is there, whatever fails
                _sync(self.output.parent)
        self._remove()

    def abandon(self) -> None:
        """Remove the folder if nothing in it can be gone on from, and let others write; after an error."""
        finished = [folder.glob("*.json") for folder in (self._journal, self.survey_folder)]
        if self._lock.is_locked and not any(map(any, finished)):
            self._remove()
        self.release()

    def _remove(self) -> None:
        # The lock goes last and is let go after that: nobody else can begin in a folder that vanishes.
        for path in (self.folder, self.survey_folder, self._journal, self._root):
            shutil.rmtree(path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let another process write this output."""
        self._lock.release()


def refuse_taken(output: Path) -> None:
    """Raise OutputError unless `output` is absent or an empty folder that a rename can replace."""
    with os_errors(output):
        link, mount, there = output.is_symlink(), output.is_mount(), output.exists()
        empty = output.is_dir() and not any(output.iterdir())
        holds_model = output.is_dir() and any(output.glob("*.safetensors*"))
    if link or mount:
        kind = "link" if link else "mount point"
        raise OutputError(
            f"the output path is a {kind}, which a finished folder cannot replace",
            where=str(output),
            expected="a new or empty folder",
            hint=f"Choose a new folder inside it as output.path, such as {output.name}/model.",
        )
    if there and not empty:
        raise OutputError(
            "the output folder already holds a model" if holds_model else "the output path is taken",
            where=str(output),
            expected="a new or empty folder",
            hint="Choose another output.path, or move the old one away; nothing is ever overwritten.",
        )


def _can_be_made(path: Path) -> bool:
    """Say whether the system can take `path`, and UTF-8 its last part, which is stored in the recipe."""
    try:
        path.name.encode()
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False
