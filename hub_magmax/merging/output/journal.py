"""Journal of a merge: records of finished shards, and of shards sent elsewhere."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from hub_magmax.files import sha256_of, write_durably
from hub_magmax.merging.output.report import LostPart, ShardRecord


class Journal:
    """Durable records of finished shards, one small file each.

    Attributes:
        folder: Holds the records.
        shards: Holds the shards.
        num_open: Shards in the making at a time: one is written while another is read back.
    """

    num_open = 2

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.shards = folder, shards

    def record(self, record: ShardRecord) -> None:
        """Note that a shard is finished."""
        write_durably(self.folder / f"{record.file}.json", json.dumps(asdict(record)))

    def recorded(self, file: str) -> ShardRecord | None:
        """Return the record of a shard, or None if it is not finished."""
        try:
            values = json.loads((self.folder / f"{file}.json").read_text(encoding="utf-8"))
            record = ShardRecord(**values)
            return replace(
                record,
                counts=tuple(record.counts),
                num_unaligned=tuple(record.num_unaligned),
                not_finite=tuple(record.not_finite),
                lost=tuple(LostPart(**part) for part in values.get("lost", ())),
            )
        except (OSError, ValueError, TypeError):
            return None

    def intact(self, file: str) -> ShardRecord | None:
        """Return the record of a finished shard whose bytes still have the recorded sha256, else None."""
        record = self.recorded(file)
        with contextlib.suppress(OSError):
            if record and sha256_of(self.shards / file) == record.sha256:
                return record
        return None

    def send(self, file: str, place: str) -> None:
        """Note that a finished shard is stored at `place` too, and remove it here."""
        write_durably(self.folder / f"{file}.sent", place)
        (self.shards / file).unlink(missing_ok=True)

    def sent(self, file: str, place: str) -> ShardRecord | None:
        """Return the record of a finished shard that was sent to `place`, else None."""
        with contextlib.suppress(OSError, ValueError):
            if (self.folder / f"{file}.sent").read_text(encoding="utf-8") == place:
                (self.shards / file).unlink(missing_ok=True)  # left by a kill after the note
                return self.recorded(file)
        return None

    def finished(self) -> Iterator[str]:
        """Yield the names of the finished shards."""
        return (path.name.removesuffix(".json") for path in self.folder.glob("*.json"))

    def clear(self) -> None:
        """Remove all records: the same merge makes its shards again."""
        for file in list(self.finished()):
            for kind in ("sent", "json"):
                (self.folder / f"{file}.{kind}").unlink(missing_ok=True)
