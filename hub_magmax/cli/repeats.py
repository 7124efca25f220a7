"""Failures that repeat, in the log: the first of a kind is told, then how many there were now and then."""

from __future__ import annotations

import logging

#: Seconds between two lines about failures of one kind.
PAUSE_SECONDS = 60.0


class Repeats(logging.Filter):
    """Leaves failures out that were told of late, and says when they end.

    Records of a failure have `fails`, its kind, and those of a success after failures have `passes`. Many
    threads may ask a Hub that is lost, each of them several times.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told_at: dict[str, float] = {}
        self._count, self._is_open = 0, False

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether to write a record, whose text changes where it stands for several."""
        if kind := getattr(record, "fails", ""):
            self._count += 1
            return record.levelno < logging.INFO or self._is_due(kind, record)
        if hasattr(record, "passes"):
            if self._is_open:
                record.levelno, record.levelname = logging.INFO, "INFO"
                record.msg, record.args = "requests are answered again, after %d that failed", (self._count,)
            self._count, self._is_open = 0, False
        return True

    def _is_due(self, kind: str, record: logging.LogRecord) -> bool:
        before = self._told_at.get(kind)
        if before is not None and record.created - before < PAUSE_SECONDS:
            return False
        if self._is_open:
            record.msg, record.args = "%s; %d requests failed by now, and are sent again", (kind, self._count)
        self._told_at[kind], self._is_open = record.created, True
        return True
