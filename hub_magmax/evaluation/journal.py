"""Journal of a long measurement: outcomes that are kept, so that none is measured twice.

A journal is one file of lines. The first is a digest of everything that the outcomes depend on, so that those
of another recipe, other data or other software are never taken for these; each other line is one finished
measurement. A kill can cut the last line short, which then does not count.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from hub_magmax.errors import OutputError
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.files import claim, from_here
from hub_magmax.text import Report, number_of

Outcomes = tuple[Outcome, ...]


def stored(outcomes: Sequence[Outcome]) -> list[list[float | bool | None]]:
    """Return outcomes as plain values."""

    def plain(value: float | None) -> float | None:
        return None if value is None else float(value)

    return [[plain(o.score), plain(o.probability), plain(o.margin), bool(o.is_cut)] for o in outcomes]


def restored(values: Sequence[Sequence[Any]]) -> Outcomes:
    """Return the outcomes of `stored`, equal to the last bit."""
    return tuple(Outcome(*value) for value in values)


class Journal:
    """Finished measurements by key: outcomes by the name of their examples. Without a file none is kept."""

    def __init__(self, file: IO[str] | None = None, found: Mapping[str, Any] | None = None) -> None:
        self._file = file
        self._found = dict(found or {})

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: str) -> dict[str, Outcomes] | None:
        """Return a finished measurement, None where it is not there."""
        values = self._found.get(key)
        return None if values is None else {name: restored(value) for name, value in values.items()}

    def add(self, key: str, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
        """Keep a finished measurement."""
        values = {name: stored(value) for name, value in outcomes.items()}
        if self._file is not None:
            self._found[key] = values
            self._file.write(json.dumps([key, values]) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


@contextlib.contextmanager
def open_journal(path: Path, subject: str, report: Report = lambda line: None) -> Iterator[Journal]:
    """Open the journal of a measurement; it stays when the block ends, unless it is empty.

    Args:
        path: Its file. Where that cannot be written, nothing is kept, and it is said.
        subject: Digest of everything that the outcomes depend on; outcomes of another subject are dropped.
        report: Called with a line where measurements are dropped, or kept for the next attempt.

    Raises:
        OutputError: If another process is at it.
    """
    file = _claimed(path, report)
    if file is None:
        yield Journal()
        return
    with file:
        found = _read(file, subject, report)
        journal = Journal(file, found)
        try:
            yield journal
        except BaseException:
            if len(journal):
                kept = f"{number_of(len(journal), 'result')} {'is' if len(journal) == 1 else 'are'} kept"
                report(f"{kept} in {from_here(path)}: the same command goes on there")
            raise
        finally:
            if not len(journal):
                path.unlink(missing_ok=True)


def _claimed(path: Path, report: Report) -> IO[str] | None:
    """Return the journal's file, open for this process alone; None where it cannot be written.

    Raises:
        OutputError: If another process measures the same.
    """
    while True:
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            report(
                f"no journal can be kept in {from_here(path.parent)} ({error.strerror}): an interrupted "
                "command begins again"
            )
            return None
        with contextlib.ExitStack() as stack:
            stack.enter_context(file)
            claim(
                file,
                OutputError(
                    "another process measures the same at the moment",
                    where=from_here(path),
                    hint="Wait for it, or end it first.",
                ),
            )
            if _is_at(file, path):
                stack.pop_all()
                return file


def _is_at(file: IO[str], path: Path) -> bool:
    """Say whether a file is there still: a process that ends between opening and locking removes it."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _read(file: IO[str], subject: str, report: Report) -> dict[str, Any]:
    """Return what is there for this subject, and leave the file at the end of it."""
    file.seek(0)
    lines = file.read().splitlines(keepends=True)
    found: dict[str, Any] = {}
    whole = 0
    if lines and lines[0] == f"{json.dumps(subject)}\n":
        whole = len(lines[0].encode())
        for line in lines[1:]:
            try:
                key, values = json.loads(line)
            except ValueError:
                break
            if not line.endswith("\n"):
                break
            found[key] = values
            whole += len(line.encode())
    elif len(lines) > 1:
        report("starting anew: recipe, checkpoints, data or software changed since the last measurements")
    file.seek(whole)
    file.truncate()
    if not whole:
        file.write(json.dumps(subject) + "\n")
        file.flush()
    return found
