"""Records of decisions: files that only grow, in which every line holds the sha256 of the line before.

A line is one JSON object with sorted keys. Its `previous` is the sha256 of the whole line before it, with the
line break (null in the first line), and its `digest` that of its own other values. A header line holds what
the decisions after it have in common, and each decision names its header by digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from hub_magmax.errors import OutputError, RecordError
from hub_magmax.files import canonical_json, check_files, claim, digest, from_here, os_errors, sync
from hub_magmax.text import listed

#: Of the lines' form.
VERSION = 1

#: Broken lines that a message names.
_MOST_NAMED = 5

#: How the first line of every record begins: by this a line cut short is told from a file of another kind.
_BEGINNING = b'{"contents":{'

LOG = logging.getLogger(__name__)

#: Said of the name of a record, and of a number.
TORN = "%s: the last line was cut short after %d bytes, so that its decision does not count"


@dataclass(frozen=True)
class Header:
    """What decisions have in common.

    Attributes:
        model: Where the model was, and its `task`: `place` as a person wrote it, and what a lock says of such
            a place (`kind`, `repo_id`, `commit`, `part`).
        contents: Digests of what the model is made of; null where one is unknown.
        settings: How answers are made.
        environment: Software, device and number of threads.
    """

    model: Mapping[str, Any] = field(hash=False)
    contents: Mapping[str, Any] = field(hash=False)
    settings: Mapping[str, Any] = field(hash=False)
    environment: Mapping[str, Any] = field(hash=False)

    @property
    def digest(self) -> str:
        return digest(asdict(self))


@dataclass(frozen=True)
class Decision:
    """One answer of a model.

    Attributes:
        header: Digest of its header.
        input: What was asked: its `digest`, and the `text` or `image` itself unless that was left out.
        seed: Of its random draws; None where nothing is drawn.
        output: What the model answered.
        time: When it was recorded, in UTC.
    """

    header: str
    input: Mapping[str, Any] = field(hash=False)
    seed: int | None
    output: Mapping[str, Any] = field(hash=False)
    time: str


@dataclass(frozen=True)
class Checked:
    """Result of reading a record whose lines follow each other.

    Attributes:
        headers: By digest.
        num_decisions: How many there are.
        last: The sha256 of the last line; None of a record without lines.
        whole_bytes: Length of the whole lines.
        torn_bytes: Length of a last line that was cut short; 0 where there is none.
    """

    headers: Mapping[str, Header] = field(hash=False)
    num_decisions: int
    last: str | None
    whole_bytes: int
    torn_bytes: int


def check_record(path: Path) -> Checked:
    """Read a record, and check that every line is as it was written and follows the one before.

    Lines that are missing at the end cannot be found: whoever keeps the sha256 of the last line can.

    Raises:
        RecordError: If a line was changed, is missing or stands elsewhere, or the file is no record.
    """
    try:
        with path.open("rb") as file:
            return _checked(file, from_here(path))
    except OSError as error:
        raise RecordError(
            f"the record cannot be read ({error.strerror})", where=from_here(path), hint="Check the path."
        ) from error


def _checked(file: IO[bytes], where: str) -> Checked:
    """Return `check_record` of a file that is open at its beginning."""
    headers: dict[str, Header] = {}
    previous, is_known, num_decisions, whole_bytes, torn_bytes = None, True, 0, 0, 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            _refuse_foreign(line, whole_bytes, where)
            torn_bytes = len(line)
            break
        values = _values(line)
        if values is None or (is_known and values["previous"] != previous):
            file.seek(0)
            raise _broken(file, where)
        found = _parsed(values, f"{where}, line {number}")
        if isinstance(found, Header):
            headers[found.digest] = found
        elif found.header not in headers:
            raise RecordError(
                "the decision names a header that is not there", where=f"{where}, line {number}"
            )
        num_decisions += isinstance(found, Decision)
        previous, whole_bytes = _sha256(line), whole_bytes + len(line)
    return Checked(headers, num_decisions, previous, whole_bytes, torn_bytes)


def read_decisions(path: Path, checked: Checked) -> Iterator[tuple[int, Decision]]:
    """Yield the decisions of a record that was checked, each with the number of its line.

    Lines that were added since are left out.
    """
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            position += len(line)
            if position > checked.whole_bytes:
                return
            found = _parsed(_values(line) or {}, f"{from_here(path)}, line {number}")
            if isinstance(found, Decision):
                yield number, found


def _line(values: Mapping[str, Any]) -> bytes:
    return (canonical_json({**values, "digest": digest(values)}) + "\n").encode()


def _sha256(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _values(line: bytes) -> dict[str, Any] | None:
    """Return the values of a line without its digest; None if it is not as this program wrote it."""
    try:
        values = json.loads(line)
        values.pop("digest")
        is_ours = "previous" in values and _line(values) == line
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return values if is_ours else None


def _parsed(values: Mapping[str, Any], where: str) -> Header | Decision:
    from pydantic import TypeAdapter, ValidationError

    kind: type[Header] | type[Decision] = Header if "contents" in values else Decision
    try:
        if values["version"] != VERSION:
            raise KeyError
        fields = {key: value for key, value in values.items() if key not in ("previous", "version")}
        found: Header | Decision = TypeAdapter[Header | Decision](kind).validate_python(fields)
    except (KeyError, ValidationError) as error:
        raise RecordError(
            "this is no line of a record of this version",
            where=where,
            hint="Replay it with the version of hub_magmax that wrote it.",
        ) from error
    return found


def _refuse_foreign(line: bytes, whole_bytes: int, where: str) -> None:
    """Raise RecordError for a file of one line that is not the beginning of a record."""
    if whole_bytes == 0 and line[: len(_BEGINNING)] != _BEGINNING[: len(line)]:
        raise _foreign(where)


def _foreign(where: str) -> RecordError:
    return RecordError(
        "this is no record of decisions",
        where=where,
        expected="a file that `hub-magmax predict --record` or `hm.recording` wrote",
        hint="Name another file; to record, one that is not there yet.",
    )


def _broken(file: IO[bytes], where: str) -> RecordError:
    """Return the error that names the lines that were changed, and those that are not in their place."""
    lines = [line for line in file if line.endswith(b"\n")]
    read = list(map(_values, lines))
    if not any(read):
        return _foreign(where)
    return RecordError(
        listed(list(_problems(read, list(map(_sha256, lines)))), _MOST_NAMED),
        where=where,
        expected="lines as they were written, each with the sha256 of the one before",
        hint="Take the record from a copy. New decisions go into another file.",
    )


def _problems(read: Sequence[Mapping[str, Any] | None], hashes: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with lines: their values, None for a changed one, and the sha256 of each."""
    numbers = {sha256: number for number, sha256 in enumerate(hashes, 1)}
    before: Mapping[str, Any] | None = {}
    for number, (values, follows) in enumerate(zip(read, [None, *hashes], strict=False), 1):
        if values is None:
            yield f"line {number} was changed"
        elif before is not None and values["previous"] != follows:  # a changed line before is named already
            place = numbers.get(values["previous"])
            missing = f"before line {number} a line is missing"
            yield missing if place is None else f"line {number} belongs after line {place}"
        before = values


class RecordWriter:
    """A record that is open for more lines. Each is on the disk when `add` returns."""

    def __init__(self, file: IO[bytes], found: Checked, where: Path) -> None:
        self._file, self._headers, self._where = file, set(found.headers), where
        self._end = found.whole_bytes, found.last  # one value, which no interruption can leave half changed

    @property
    def last(self) -> str | None:
        """The sha256 of the last line; None while there is none."""
        return self._end[1]

    def add(self, line: Header | Decision) -> None:
        """Write a line; a header that is there already is not written again.

        Raises:
            OutputError: If it cannot be written; the record is then as before.
        """
        if isinstance(line, Header) and line.digest in self._headers:
            return
        if self._file.closed:
            raise OutputError(
                "the record is closed", where=from_here(self._where), hint="Ask inside the `with` block."
            )
        size, last = self._end
        content = _line({**asdict(line), "previous": last, "version": VERSION})
        with os_errors(self._where, "Free some space, then record on: what is there stays."):
            try:
                self._file.truncate(size)  # of what an interrupted call may have written
                _write(self._file, content)
            except BaseException:
                with contextlib.suppress(OSError):
                    self._file.truncate(size)
                raise
        self._end = size + len(content), _sha256(content)
        if isinstance(line, Header):
            self._headers.add(line.digest)


def _write(file: IO[bytes], content: bytes) -> None:
    while content:
        content = content[file.write(content) :]
    os.fsync(file.fileno())


@contextlib.contextmanager
def open_record(path: Path) -> Iterator[RecordWriter]:
    """Open a record for more lines, after all that are there were checked; a new one where there is none.

    A last line that a kill cut short is taken away, which `info` of the log tells.

    Raises:
        OutputError: If it cannot be written, or another process records into it.
        RecordError: If it is no record, or a broken one.
    """
    check_files([path])
    with os_errors(path):
        file = path.open("a+b", buffering=0)
    with file:
        claim(
            file,
            OutputError(
                "another process records into this file at the moment",
                where=from_here(path),
                hint="Name another file for each process.",
            ),
        )
        file.seek(0)
        with path.open("rb") as reading:
            found = _checked(reading, from_here(path))
        with os_errors(path):
            if found.torn_bytes:
                LOG.info(TORN, from_here(path), found.torn_bytes)
                file.truncate(found.whole_bytes)
            sync(path.absolute().parent)
        yield RecordWriter(file, found, path)
