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
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from filelock import FileLock, Timeout

from hub_magmax.errors import OutputError
from hub_magmax.reports import ShardRecord


class ShardFile:
    """A file that is written once from front to back and hashed on the way."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = self._temporary.open("wb", buffering=0)
        self._sha256 = hashlib.sha256()
        self.size_bytes = 0

    def write(self, content: bytes | memoryview) -> None:
        self._sha256.update(content)
        rest = memoryview(content)
        self.size_bytes += len(rest)
        while rest:
            rest = rest[self._file.write(rest) :]

    def finish(self) -> str:
        """Put the file in its place, durably, and return its sha256."""
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.rename(self._path)
        return self._sha256.hexdigest()

    def abandon(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class PartialFolder:
    """The place beside the output where one merge is being made.

    `NAME.partial/model` becomes the output; `NAME.partial/journal` holds what is finished.

    Args:
        output: Where the finished folder will be.
        plan_digest: Identifies the merge; finished shards of another one are thrown away.
    """

    def __init__(self, output: Path, plan_digest: str) -> None:
        self.output, self.plan_digest = output, plan_digest
        self._root = output.with_name(output.name + ".partial")
        self.folder, self._journal = self._root / "model", self._root / "journal"
        self._lock = FileLock(self._root / "lock", blocking=False)

    def prepare(self) -> None:
        """Create the folder, or clean it if another merge left it; one process does this.

        Raises:
            OutputError: If the output is taken, being written by another process, or cannot be.
        """
        refuse_taken(self.output)
        with os_errors(self._root):
            self._root.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout as error:
                raise OutputError(
                    "another process is writing this output",
                    where=str(self.output),
                    hint="Wait for it to end, or choose another output.path.",
                ) from error
            if self._stored_digest() != self.plan_digest:
                shutil.rmtree(self.folder, ignore_errors=True)
                shutil.rmtree(self._journal, ignore_errors=True)
            self.folder.mkdir(exist_ok=True)
            self._journal.mkdir(exist_ok=True)
            _write_durably(self._journal / "plan", self.plan_digest)

    def _stored_digest(self) -> str:
        with contextlib.suppress(OSError):
            return (self._journal / "plan").read_text(encoding="utf-8")
        return ""

    def record(self, record: ShardRecord) -> None:
        _write_durably(self._journal / f"{record.file}.json", json.dumps(asdict(record)))

    def recorded(self, file: str) -> ShardRecord | None:
        """Return what the journal says about a shard, or None if it is not finished."""
        try:
            values = json.loads((self._journal / f"{file}.json").read_text(encoding="utf-8"))
            record = ShardRecord(**values)
            return replace(record, counts=tuple(record.counts), num_unaligned=tuple(record.num_unaligned))
        except (OSError, ValueError, TypeError):
            return None

    def intact(self, file: str) -> ShardRecord | None:
        """Return the record of a finished shard whose bytes still have the recorded sha256, else None."""
        record = self.recorded(file)
        with contextlib.suppress(OSError):
            if record and sha256_of(self.folder / file) == record.sha256:
                return record
        return None

    def publish(self) -> None:
        """Turn the folder into the output by one rename."""
        refuse_taken(self.output)
        with os_errors(self.output):
            if self.output.exists():
                self.output.rmdir()  # empty, or refuse_taken had objected
            self.folder.rename(self.output)
            self.release()
            shutil.rmtree(self._root)

    def abandon(self) -> None:
        """Remove the folder if no shard is finished yet, and let others write; called after an error."""
        if self._lock.is_locked and not any(self._journal.glob("*.json")):
            self.release()
            shutil.rmtree(self._root, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let another process write this output."""
        self._lock.release()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_taken(output: Path) -> None:
    """Raise OutputError unless `output` is absent or an empty folder."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        holds_model = output.is_dir() and any(output.glob("*.safetensors*"))
        raise OutputError(
            "the output folder already holds a model" if holds_model else "the output path is taken",
            where=str(output),
            expected="a new or empty folder",
            hint="Choose another output.path, or move the old one away; nothing is ever overwritten.",
        )


@contextlib.contextmanager
def os_errors(where: Path) -> Iterator[None]:
    """Turn an error of the file system while writing into an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot be written ({error.strerror})",
            where=str(error.filename or where),
            hint="Free some space or choose another output.path; finished shards are kept, "
            "and the same command goes on from there.",
        ) from error


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old content or the new one."""
    with os_errors(path):
        _write_durably(path, text)
