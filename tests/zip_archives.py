"""Checkpoints in zip archives with stored members: a kind of source as another package brings it.

Announced by one line: `zip = "tests.zip_archives:ZipArchive"` in the entry points `hub_magmax.sources`.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hub_magmax.checkpoints.locations import Location
from hub_magmax.checkpoints.source import FileSource
from hub_magmax.errors import SourceError


@dataclass(frozen=True)
class ZipArchive(Location, name="zip"):
    path: Path
    written: str

    @classmethod
    def parse(cls, written: str, folder: Path) -> ZipArchive:
        return cls(folder / written.removeprefix("zip:"), written)

    def open(self) -> FileSource:
        return _ZipSource(self.path, self.written)

    @property
    def uri(self) -> str:
        return self.written


class _ZipSource(FileSource):
    def __init__(self, path: Path, label: str) -> None:
        self.label, self._path = label, path
        try:
            with zipfile.ZipFile(path) as archive:
                self._members = {member.filename: member for member in archive.infolist()}
        except (OSError, zipfile.BadZipFile) as error:
            raise SourceError(f"cannot be read ({error})", where=label) from error

    @property
    def sizes(self) -> Mapping[str, int]:
        return {name: self._members[name].file_size for name in sorted(self._members)}

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        with self._path.open("rb") as file:
            file.seek(self._members[path].header_offset)
            header = file.read(30)  # ends with the lengths of two fields before the content
            fields = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            file.seek(fields + start, os.SEEK_CUR)
            assert file.readinto(buffer) == len(buffer)

    def version(self, path: str) -> tuple[int, ...]:
        found = self._path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def is_current(self) -> bool:
        return self._path.is_file()
