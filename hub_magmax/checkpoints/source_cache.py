"""Checkpoints that one command has opened, so that each is listed and its headers are read once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from hub_magmax.checkpoints.locations import Location
from hub_magmax.checkpoints.source import FileSource
from hub_magmax.text import step

LOG = logging.getLogger(__name__)

Found = TypeVar("Found")

#: Checkpoints whose headers are read side by side.
PARALLEL_SOURCES = 8


class SourceCache:
    """The checkpoints that one command reads: each is listed, and its headers are read, once.

    What is found out about them is kept too. A source from here can be closed and read again. Folders whose
    files changed since are opened anew.
    """

    def __init__(self) -> None:
        self._opened: dict[Location, FileSource] = {}
        self._found: dict[Hashable, Any] = {}

    def recall(self, question: Hashable, find: Callable[[], Found]) -> Found:
        """Return what `find` gave for this question before, or gives now: all sites ask the same."""
        if question not in self._found:
            self._found[question] = find()
        found: Found = self._found[question]
        return found

    def open(self, location: Location) -> FileSource:
        """Return the checkpoint at a pinned location."""
        source = self._opened.get(location)
        if source is None or not source.is_current():
            with step("opening a checkpoint"):
                source = self._opened[location] = location.open()
            LOG.debug("opened %s, %d files", source.label, len(source.sizes))
        return source

    @step("reading the headers")
    def read_headers(self, locations: Iterable[Location]) -> None:
        """Read the headers of remote checkpoints, several at a time: most of the time is waiting."""
        remote = dict.fromkeys(location for location in locations if location.is_remote)
        with ThreadPoolExecutor(PARALLEL_SOURCES) as pool:
            for _ in pool.map(lambda location: self.open(location).index, remote):
                pass
