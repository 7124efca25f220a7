"""Write a checkpoint folder that is complete or absent.

Everything goes into `NAME.partial` beside the output; one rename makes it the output. Each
finished shard leaves a small record in the journal there, so that the same merge, started
again, goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from filelock import FileLock, Timeout

from hub_magmax.errors import OutputError
from hub_magmax.files import _sync, _write_durably, os_errors, sha256_of, write_text
from hub_magmax.merging.output.report import ShardRecord


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
